"""Text to windows of tokens: which tokens of each are scored, and how many words they begin.

Shapes: B rows in a batch, T tokens in a window, N tokens in a document.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, islice
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerFast

from keyreduce.data.batches import separator_ids
from keyreduce.data.encoding import Document, encode
from keyreduce.errors import KeyreduceError

_SPACE = re.compile(r"\s+")


class Window(NamedTuple):
    """Tokens that a model sees at once.

    Attributes:
        tokens_T: their ids (LongTensor).
        words_T: how many words each of them begins (LongTensor); see `words_per_token`.
        first: the place of the first token that is scored, at least 1; those before it are context alone.
    """

    tokens_T: torch.Tensor
    words_T: torch.Tensor
    first: int


def words_per_token(document: str, ends_N: torch.Tensor, before: str = "") -> torch.Tensor:
    """Return how many words each token of a document begins (LongTensor, N).

    Words are counted as lm-evaluation-harness does for the word perplexity of its task wikitext: the pieces that
    ``re.split(r"\\s+", document)`` gives, an empty one before a space at the start or after one at the end included.
    A piece goes to the token that holds the first character of the space before it, or the document's first character.
    So the numbers add up to what the harness counts, however the tokens are cut into windows. ``ends_N`` says where in
    the document each token ends (LongTensor), not descending; there is at least one token. Of a document that comes in
    parts, ``before`` is the text of the part before this one.
    """
    begins = [space.start() for space in _SPACE.finditer(document)]
    if not before:
        begins = [0, *begins]
    elif _SPACE.match(before[-1]) and begins[:1] == [0]:
        begins = begins[1:]  # the space began in the part before
    places = torch.searchsorted(ends_N, torch.tensor(begins, dtype=torch.long), right=True)
    return torch.bincount(places.clamp_(max=len(ends_N) - 1), minlength=len(ends_N))


def counted_parts(document: Document, tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Yield a document's token ids and the words that each begins (LongTensor, ``[2, N]``), its separator first.

    Those of a long document come in several parts (:mod:`keyreduce.data.encoding`).
    """
    separator, before = separator_ids(tokenizer), ""
    for part in encode(document, tokenizer):
        tokens_N = torch.tensor(separator + part.ids, dtype=torch.long)
        ends_N = torch.tensor([0] * len(separator) + part.ends, dtype=torch.long)
        if len(ends_N) != len(tokens_N):
            raise KeyreduceError(
                "the model's tokenizer is one in Python, which does not say where its tokens are, so that words cannot "
                "be counted; put the tokenizer.json of the model beside it"
            )
        if len(tokens_N):
            yield torch.stack([tokens_N, words_per_token(part.text, ends_N.cummax(dim=0).values, before)])
        separator, before = [], part.text


def counted_tokens(documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Yield the parts of all documents; see :func:`counted_parts`."""
    for document in documents:
        yield from counted_parts(document, tokenizer)


def windows(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, length: int, stride: int
) -> Iterator[Window]:
    """Yield windows of all documents joined, with the separator before each document.

    A window starts ``stride`` tokens after the one before it and scores its last ``stride`` tokens; the first window
    scores all it has. That is the sliding window of Hugging Face's guide to perplexity, and the rolling one of
    lm-evaluation-harness with ``max_seq_len = length - 1`` and ``context_len = length - stride``. A token with nothing
    before it in its window cannot be scored: with ``stride = length``, where windows are the rows of
    :func:`keyreduce.data.batches.token_rows`, the first of each; else the first of all.

    Documents are encoded one at a time, without the tokenizer's own special tokens. Windows have T = ``length``
    tokens, at least 2; the stride is 1 to T. What is left at the end is dropped, unless there is no other window: then
    it is one, shorter than T.
    """
    rest = torch.empty((2, 0), dtype=torch.long)
    first, is_first = 1, True
    for counted in counted_tokens(documents, tokenizer):
        rest = torch.cat([rest, counted], dim=1)
        while rest.shape[1] >= length:
            yield Window(rest[0, :length], rest[1, :length], first)
            rest = rest[:, stride:]
            first, is_first = max(1, length - stride), False
    if is_first and rest.shape[1]:
        yield Window(rest[0], rest[1], first)


def document_windows(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, length: int, stride: int
) -> Iterator[Window]:
    """Yield windows of each document on its own, with the separator before it, so that each token is scored once.

    They are those of lm-evaluation-harness's ``loglikelihood_rolling`` with ``max_seq_len = length - 1`` and
    ``context_len = length - stride``: of a document the first window scores all it has, a further one ``stride`` tokens
    more, and the last one what is left. No separator is scored. Windows have ``length`` tokens, at least 2, or those of
    a whole document where that is shorter; the stride is 1 to ``length - 1``.
    """
    for document in documents:
        held, begin, scored, wanted = torch.empty((2, 0), dtype=torch.long), 0, 1, length
        for counted in chain(counted_parts(document, tokenizer), (None,)):
            held = held if counted is None else torch.cat([held, counted], dim=1)
            total = begin + held.shape[1]
            while total >= wanted or (counted is None and scored < total):
                end = min(total, wanted)
                start = max(0, end - length)
                yield Window(held[0, start - begin : end - begin], held[1, start - begin : end - begin], scored - start)
                scored, wanted = end, end + stride
            # A further window ends after what is scored, and so begins no earlier than this.
            unneeded = max(0, scored + 1 - length) - begin
            held, begin = held[:, unneeded:], begin + unneeded


def equal_length_batches(found: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Yield lists of at most ``batch_size`` windows that follow each other and have the same length."""
    for _, same in groupby(found, key=lambda window: len(window.tokens_T)):
        while batch := list(islice(same, batch_size)):
            yield batch

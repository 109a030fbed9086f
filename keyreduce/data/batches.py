"""Text to batches of tokens, for calibration, evaluation and training alike.

Shapes: B rows in a batch, T tokens in a row, N tokens in a document, V token ids.
"""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from transformers import PreTrainedTokenizerFast

from keyreduce.data.encoding import Document, encode

SPREAD = 8
"""Over how many times as many rows those are spread that a model is fitted to or measured on."""
_SPREAD_TOKENS = 2**21  # the most that are encoded for that
_BYTE_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def separator_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the id of the token that goes before each document, or no id where the tokenizer has none for that."""
    candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id)
    return [token_id for token_id in candidates if isinstance(token_id, int)][:1]


def document_tokens(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, *, separated: bool = True
) -> Iterator[torch.Tensor]:
    """Yield each document's token ids (LongTensor, N), its separator first if they are ``separated``.

    Those of a long document come in several parts (:mod:`keyreduce.data.encoding`).
    """
    separator = separator_ids(tokenizer) if separated else []
    for document in documents:
        before = separator
        for part in encode(document, tokenizer):
            yield torch.tensor(before + part.ids, dtype=torch.long)
            before = []


def token_rows(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, row_length: int, *, separated: bool = True
) -> Iterator[torch.Tensor]:
    """Yield rows (LongTensors) of ``row_length`` token ids, cut from all documents joined, each after a separator if
    they are ``separated``.

    Documents are taken one at a time and encoded as :mod:`keyreduce.data.encoding` says, no further than rows are
    asked for. The last incomplete row is dropped, unless there is no other: then it is yielded as it is, shorter, and
    the caller informs the user.
    """
    if row_length < 1:
        raise ValueError(f"row_length is {row_length}; a row has at least one token")
    rest_N = torch.empty(0, dtype=torch.long)
    yielded = False
    for tokens_N in document_tokens(documents, tokenizer, separated=separated):
        rest_N = torch.cat([rest_N, tokens_N])
        complete = len(rest_N) // row_length
        for row_T in rest_N[: complete * row_length].view(complete, row_length):
            yielded = True
            yield row_T
        rest_N = rest_N[complete * row_length :]
    if not yielded and len(rest_N):
        yield rest_N


def spread_rows(rows: Iterable[torch.Tensor], number: int, spread: int = SPREAD) -> list[torch.Tensor]:
    """Return ``number`` rows, evenly spaced, of the first ``spread`` times as many; all where there are no more.

    Rows side by side are of few documents, and what fits few may not fit others.
    """
    drawn = list(islice(rows, number * spread))
    taken = min(number, len(drawn))
    return [drawn[place * len(drawn) // taken] for place in range(taken)]


def spread_of(tokens: int) -> int:
    """Return over how many times as much text so many tokens are spread, so that encoding it takes seconds."""
    return max(1, min(SPREAD, _SPREAD_TOKENS // max(1, tokens)))


def batches(rows: Iterable[torch.Tensor], batch_size: int, num_batches: int | None = None) -> Iterator[torch.Tensor]:
    """Yield LongTensors (B, T) of ``batch_size`` rows each, the last one of fewer where rows run out.

    No more rows, which have equal length T, are drawn than are needed for ``num_batches``; None takes all.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; a batch has at least one row")
    rows = iter(rows) if num_batches is None else islice(rows, num_batches * batch_size)
    while batch := list(islice(rows, batch_size)):
        yield torch.stack(batch)


def text_token_ids(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> torch.Tensor:
    """Return the ids below ``vocab_size`` that text is made of (LongTensor, S): no special tokens, none without use."""
    return bytes_per_token(tokenizer)[:vocab_size].nonzero()[:, 0]


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return how many UTF-8 bytes of text each token id stands for (LongTensor, V); special tokens stand for none.

    Exact for byte-level BPE, where each character of a token is one byte, also when a token is only a part of a UTF-8
    character. For other tokenizers it is the length of the token's text, with SentencePiece's mark read as a space and
    its ``<0x0A>`` fallback as one byte. Ids that the tokenizer does not use stand for no bytes.
    """
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    steps = [decoder, *decoder.get("decoders", [])]
    is_byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    special = set(tokenizer.all_special_ids)
    lengths_V = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.long)
    for token, token_id in vocabulary.items():
        if token_id in special or (token_id in added and added[token_id].special):
            continue
        if token_id in added:
            length = len(token.encode())
        elif is_byte_level:
            length = len(token)
        elif _BYTE_FALLBACK.fullmatch(token):
            length = 1
        else:
            length = len(token.replace("\u2581", " ").encode())
        lengths_V[token_id] = length
    return lengths_V

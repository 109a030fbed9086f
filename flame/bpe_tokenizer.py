"""A byte-level BPE tokenizer, trained on the text that a model is trained on."""

from collections.abc import Iterable, Iterator

from byte_tokenizer import SEPARATOR, byte_level, with_separator
from tokenizers import models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHARACTERS = 30_000_000
"""So much text teaches the merges: with more, those of 16,384 tokens hardly change, and it takes longer."""


def bpe_tokenizer(documents: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of at most ``vocabulary`` ids: 0 is ``<|endoftext|>``, then the 256 bytes, then merges.

    Any text survives a round trip. Of the documents those at the beginning are read, :data:`CHARACTERS` in all.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_beginning(documents), trainer)
    return with_separator(tokenizer)


def _beginning(documents: Iterable[str]) -> Iterator[str]:
    left = CHARACTERS
    for document in documents:
        if left <= 0:
            return
        yield document
        left -= len(document)

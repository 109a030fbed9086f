"""The shipped models' tokenizer: one token a byte, and one that separates documents."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 257 ids: 0 to 255 are the bytes, 256 is ``<|endoftext|>``, both bos and eos.

    It is byte-level BPE without merges, so that stock ``AutoTokenizer`` loads it. Any text survives a round trip.
    """
    # ByteLevel shows a printable byte as the character of that code, and the others, in order, as code 256 and up.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [ord(character) for character in alphabet if ord(character) < 256]
    others = [byte for byte in range(256) if byte not in printable]
    vocabulary = dict(zip(alphabet, printable + others, strict=True))
    tokenizer = byte_level(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([SEPARATOR])
    return with_separator(tokenizer)


def byte_level(model: models.Model) -> Tokenizer:
    """Return a tokenizer of bytes, which are grouped into words before the model sees them."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def with_separator(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Return transformers' tokenizer of one that has the token ``<|endoftext|>``, which becomes bos and eos."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        model_max_length=1_000_000,
        clean_up_tokenization_spaces=False,
    )

import logging
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from keyreduce.data.batches import (
    batches,
    bytes_per_token,
    document_tokens,
    spread_of,
    spread_rows,
    text_token_ids,
    token_rows,
)

SEPARATOR = "<|endoftext|>"
TEXTS = ["def f(x):\n    return x  # é 四 😀\n" * 3, "the state is low-rank\n", "\r\n\t\x00 don't"]


def byte_level(**special_tokens) -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges, trained on TEXTS, so that some tokens are part of a UTF-8 character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special_tokens)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level(bos_token=SEPARATOR, eos_token=SEPARATOR)


def test_each_document_follows_its_separator(tokenizer):
    tokens = [tokens_N.tolist() for tokens_N in document_tokens(TEXTS, tokenizer)]
    assert [tokens_N[0] for tokens_N in tokens] == [tokenizer.bos_token_id] * len(TEXTS)
    assert [tokenizer.decode(tokens_N[1:]) for tokens_N in tokens] == TEXTS


def test_without_a_separator_documents_are_joined_as_they_are():
    tokenizer = byte_level()
    assert [tokenizer.decode(tokens_N) for tokens_N in document_tokens(TEXTS, tokenizer)] == TEXTS


def test_eos_separates_where_there_is_no_bos():
    tokenizer = byte_level(eos_token=SEPARATOR)
    assert next(document_tokens(TEXTS, tokenizer))[0] == tokenizer.eos_token_id


def test_rows_are_the_joined_documents_cut(tokenizer):
    joined = [token for text in TEXTS for token in [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]]
    for row_length in (1, 7, 16, len(joined)):
        rows = list(token_rows(TEXTS, tokenizer, row_length))
        expected = [joined[i : i + row_length] for i in range(0, len(joined) - row_length + 1, row_length)]
        assert [row.tolist() for row in rows] == expected
        assert rows[0].dtype == torch.long


def test_only_row_may_be_short(tokenizer):
    (row,) = token_rows(["ab"], tokenizer, 1000)
    assert row.tolist() == [tokenizer.bos_token_id, *tokenizer("ab")["input_ids"]]
    assert list(token_rows([], tokenizer, 1000)) == []


def test_rows_are_streamed(tokenizer):
    def documents():
        yield "x" * 100
        raise AssertionError("the second document is not needed yet")

    assert len(next(token_rows(documents(), tokenizer, 10))) == 10


def test_long_document_gives_all_its_tokens_and_no_warning(tokenizer, caplog):
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    try:
        (tokens_N,) = document_tokens(["x y " * 100], tokenizer)
    finally:
        transformers_logger.removeHandler(caplog.handler)
    assert len(tokens_N) > tokenizer.model_max_length
    assert not caplog.records


def test_batches_keep_order_and_the_last_is_partial():
    rows = [torch.tensor([n, n + 100]) for n in range(7)]
    shapes = [batch_BT.shape for batch_BT in batches(rows, 3)]
    assert shapes == [(3, 2), (3, 2), (1, 2)]
    assert torch.equal(torch.cat(list(batches(rows, 3))), torch.stack(rows))


def test_no_more_rows_are_drawn_than_batches_need():
    rows = iter([torch.tensor([n]) for n in range(10)])
    assert [batch_BT.flatten().tolist() for batch_BT in batches(rows, 2, num_batches=3)] == [[0, 1], [2, 3], [4, 5]]
    assert next(rows).item() == 6


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_are_errors(tokenizer, size):
    with pytest.raises(ValueError, match="at least one token"):
        next(token_rows(TEXTS, tokenizer, size))
    with pytest.raises(ValueError, match="at least one row"):
        next(batches([], size))


def test_bytes_of_byte_level_tokens_add_up(tokenizer):
    lengths_V = bytes_per_token(tokenizer)
    assert lengths_V.shape == (len(tokenizer),)
    assert lengths_V[tokenizer.bos_token_id] == 0
    assert lengths_V.max() > 1
    generator = random.Random(0)
    scrambled = "".join(generator.choices("aé四😀 \n\t\u2028ʼ", k=500))
    for text in (*TEXTS, scrambled):
        assert lengths_V[tokenizer(text)["input_ids"]].sum() == len(text.encode())


def test_bytes_of_added_tokens():
    tokenizer = byte_level(bos_token=SEPARATOR)
    tokenizer.add_tokens(["é    "])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    lengths_V = bytes_per_token(tokenizer)
    assert lengths_V[tokenizer.convert_tokens_to_ids("é    ")] == 6
    assert lengths_V[tokenizer.convert_tokens_to_ids("<|tool|>")] == 0
    ids = text_token_ids(tokenizer, len(tokenizer)).tolist()
    assert tokenizer.convert_tokens_to_ids("é    ") in ids
    assert not {tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|tool|>")} & set(ids)
    assert text_token_ids(tokenizer, 100).tolist() == [token_id for token_id in ids if token_id < 100]


def test_bytes_of_sentencepiece_tokens():
    vocabulary = {"<unk>": 0, "\u2581state": 1, "é": 2, "<0x0A>": 3}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert bytes_per_token(tokenizer).tolist() == [0, 6, 2, 1]


@pytest.mark.parametrize(
    ("rows", "number", "spread", "expected"),
    [
        (100, 4, 5, [0, 5, 10, 15]),
        (10, 4, 5, [0, 2, 5, 7]),
        (3, 4, 5, [0, 1, 2]),
        (100, 3, 1, [0, 1, 2]),
        (0, 3, 2, []),
    ],
)
def test_rows_are_spread_evenly_as_far_as_the_text_goes(rows, number, spread, expected):
    given = (torch.tensor(row) for row in range(rows))
    assert [int(row) for row in spread_rows(given, number, spread)] == expected


def test_so_much_text_as_is_encoded_in_seconds():
    assert [spread_of(tokens) for tokens in (1, 2**18, 2**19, 2**21, 2**30)] == [8, 8, 4, 1, 1]

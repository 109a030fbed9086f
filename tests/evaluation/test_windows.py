import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keyreduce.checkpoint.find import DEFAULT_MODEL, SHIPPED
from keyreduce.data.batches import token_rows
from keyreduce.evaluation.windows import counted_tokens, document_windows, equal_length_batches, windows

SEPARATOR = 256
BYTES = AutoTokenizer.from_pretrained(SHIPPED / DEFAULT_MODEL)
DOCUMENTS = ["the state is low-rank, é 四 😀\n" * 3, "x", " two\t \nwords \u3000", "def f(x):\n    return x\n"]
spaced_text = st.text(st.sampled_from("ab é😀,\n\t \u00a0\u3000"), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def trimming() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose offsets leave out the spaces around a token, as GPT-2's do; ' a' is one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "Ġa", "Ġb", "ab", "ĠĠ"])}
    merges = [("Ġ", "a"), ("Ġ", "b"), ("a", "b"), ("Ġ", "Ġ")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def joined() -> list[int]:
    """The tokens, from the definition: a token is a byte, and 256 goes before each document."""
    return [token for document in DOCUMENTS for token in [SEPARATOR, *document.encode()]]


@given(spaced_text)
def test_each_word_goes_to_the_token_that_begins_it(document):
    ((tokens_N, words_N),) = counted_tokens([document], BYTES)
    expected = [0]
    for place, character in enumerate(document):
        space_begins = character.isspace() and not (place and document[place - 1].isspace())
        expected += [space_begins + (place == 0)] + [0] * (len(character.encode()) - 1)
    assert tokens_N.tolist() == [SEPARATOR, *document.encode()]
    assert words_N.tolist() == expected
    assert sum(expected) == len(re.split(r"\s+", document))


@given(spaced_text)
def test_words_add_up_where_offsets_leave_out_spaces(trimming, document):
    ((_, words_N),) = counted_tokens([document], trimming)
    assert int(words_N.sum()) == len(re.split(r"\s+", document))


def test_a_word_goes_to_the_token_that_holds_its_space(trimming):
    ((tokens_N, words_N),) = counted_tokens(["ab a   b"], trimming)
    assert trimming.convert_ids_to_tokens(tokens_N.tolist()) == ["ab", "Ġa", "ĠĠ", "Ġb"]
    assert words_N.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("length", [2, 7, 50, len(joined()), 1000])
def test_windows_that_do_not_overlap_are_rows(length):
    found = list(windows(DOCUMENTS, BYTES, length, length))
    rows = list(token_rows(DOCUMENTS, BYTES, length))
    assert [window.tokens_T.tolist() for window in found] == [row.tolist() for row in rows]
    assert {window.first for window in found} == {1}


@pytest.mark.parametrize(("length", "stride"), [(2, 1), (9, 1), (9, 4), (50, 49), (50, 25)])
def test_overlapping_windows_score_each_token_once(length, stride):
    tokens = joined()
    counted = torch.cat(list(counted_tokens(DOCUMENTS, BYTES)), dim=1)
    scored = []
    for number, window in enumerate(windows(DOCUMENTS, BYTES, length, stride)):
        start = number * stride
        assert window.tokens_T.tolist() == tokens[start : start + length]
        assert window.words_T.tolist() == counted[1, start : start + length].tolist()
        scored += range(start + window.first, start + length)
        # All but the first window predict from as much as there is room for.
        assert window.first == (length - stride if number else 1)
    assert scored == list(range(1, len(scored) + 1))
    assert len(tokens) - stride < len(scored) + 1 <= len(tokens)


@pytest.mark.parametrize(("length", "stride"), [(9, 4), (9, 8), (30, 1)])
def test_overlapping_windows_are_those_of_the_harness(length, stride):
    harness = pytest.importorskip("lm_eval.utils")
    document = DOCUMENTS[0]
    theirs = list(
        harness.get_rolling_token_windows(
            list(document.encode()), SEPARATOR, max_seq_len=length - 1, context_len=length - stride
        )
    )
    ours = list(windows([document], BYTES, length, stride))
    assert 0 <= len(theirs) - len(ours) <= 1  # theirs has what is left at the end
    for (tokens_T, _, first), (context, predicted) in zip(ours, theirs, strict=False):
        assert tokens_T[:-1].tolist() == context
        assert tokens_T[first:].tolist() == predicted


@pytest.mark.parametrize(("length", "stride"), [(9, 4), (9, 8), (30, 1), (2, 1), (500, 499)])
def test_windows_of_documents_are_those_of_the_harness(length, stride):
    harness = pytest.importorskip("lm_eval.utils")
    theirs = [
        pair
        for document in DOCUMENTS
        for pair in harness.get_rolling_token_windows(
            list(document.encode()), SEPARATOR, max_seq_len=length - 1, context_len=length - stride
        )
    ]
    ours = list(document_windows(DOCUMENTS, BYTES, length, stride))
    for (tokens_T, _, first), (context, predicted) in zip(ours, theirs, strict=True):
        # Of a last window the harness takes the inputs that fill it up, of which some are predicted too.
        assert tokens_T[:-1].tolist() == context
        assert tokens_T[first:].tolist() == predicted
    words = sum(int(words_T[first:].sum()) for _, words_T, first in ours)
    assert words == sum(len(re.split(r"\s+", document)) for document in DOCUMENTS)


def test_a_batch_is_of_one_length():
    found = list(document_windows(DOCUMENTS, BYTES, 30, 29))
    batches = list(equal_length_batches(found, 2))
    assert [id(window) for batch in batches for window in batch] == [id(window) for window in found]
    assert all(1 <= len(batch) <= 2 and len({len(window.tokens_T) for window in batch}) == 1 for batch in batches)
    assert {len(batch) for batch in batches} == {1, 2}


def test_text_shorter_than_a_window_is_one():
    (window,) = windows(["ab", "c"], BYTES, 9, 3)
    assert (window.tokens_T.tolist(), window.first) == ([SEPARATOR, 97, 98, SEPARATOR, 99], 1)
    assert list(windows(["ab"], BYTES, 3, 1)) != []

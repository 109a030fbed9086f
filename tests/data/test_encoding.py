"""A long document in parts has the tokens that it has whole, whatever the tokenizer."""

import itertools
import random
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from keyreduce.checkpoint.find import DEFAULT_MODEL, SHIPPED
from keyreduce.data import encoding
from keyreduce.data.batches import token_rows
from keyreduce.data.encoding import encode
from keyreduce.data.text import FileText, stdlib_documents
from keyreduce.evaluation.windows import counted_tokens, document_windows, windows

BYTES = AutoTokenizer.from_pretrained(SHIPPED / DEFAULT_MODEL)
# As Qwen's tokenizers split text.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = "\n\n".join(itertools.islice(stdlib_documents("heldout"), 12)) + "naïve é 四五六 😀😀 \u3000 end  "


def trained(model, trainer, **parts) -> PreTrainedTokenizerFast:
    """A tokenizer of 600 tokens, trained on some of the text."""
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator([TEXT[:40_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["bytes", "gpt2", "qwen", "llama", "wordpiece", "unigram"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    """Tokenizers of all kinds: with and without words, with offsets that leave spaces out, with a mark in front."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = {"vocab_size": 600, "show_progress": False}
    if request.param == "gpt2":
        level = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trimmed = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **bpe)
        return trained(models.BPE(), trainer, pre_tokenizer=level, post_processor=trimmed)
    if request.param == "qwen":
        split = pre_tokenizers.Split(Regex(QWEN), behavior="isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        parts = {"pre_tokenizer": pre_tokenizers.Sequence([split, level]), "normalizer": normalizers.NFC()}
        return trained(models.BPE(), trainers.BpeTrainer(initial_alphabet=alphabet, **bpe), **parts)
    if request.param == "llama":  # no words: merges may be of anything that lies together
        marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        learned = trained(
            models.BPE(), trainers.BpeTrainer(**bpe), normalizer=normalizers.Sequence(marks),
            pre_tokenizer=pre_tokenizers.Split("\n", "isolated"),
        )  # fmt: skip
        learned.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
        return learned
    if request.param == "wordpiece":
        words = {"pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "normalizer": normalizers.BertNormalizer()}
        special = {"special_tokens": ["[UNK]"]}
        return trained(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(**bpe, **special), **words)
    if request.param == "unigram":
        trainer = trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **bpe)
        return trained(models.Unigram(), trainer, pre_tokenizer=pre_tokenizers.Metaspace())
    return BYTES


@pytest.fixture
def small(monkeypatch) -> None:
    """Parts of 3,000 characters, cut within their last 1,000 or so."""
    monkeypatch.setattr(encoding, "_LENGTH", 3_000)
    monkeypatch.setattr(encoding, "_SEARCHED", 1_200)
    monkeypatch.setattr(encoding, "_AROUND", 200)


def whole(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_parts_have_the_tokens_of_the_whole(small, tokenizer):
    assert len(TEXT) > 100_000
    parts = list(encode(TEXT, tokenizer))
    assert len(parts) > 30
    assert "".join(part.text for part in parts) == TEXT
    assert [token for part in parts for token in part.ids] == whole(TEXT, tokenizer)
    assert all(0 <= end <= len(part.text) for part in parts for end in part.ends)


def test_parts_do_not_depend_on_the_pieces_that_are_read(small, tokenizer):
    generator, pieces, begin = random.Random(0), [], 0
    while begin < len(TEXT):
        size = generator.choice([1, 7, 500, 9_000])
        pieces.append(TEXT[begin : begin + size])
        begin += size
    assert list(encode(iter(pieces), tokenizer)) == list(encode(TEXT, tokenizer))


def test_words_are_those_of_the_whole(small, request, monkeypatch, tokenizer):
    in_parts = list(counted_tokens([TEXT], tokenizer))
    monkeypatch.setattr(encoding, "_LENGTH", 10**7)
    (at_once,) = counted_tokens([TEXT], tokenizer)
    assert len(in_parts) > 30
    found = torch.cat(in_parts, dim=1)
    assert int(found[1].sum()) == int(at_once[1].sum())
    # Behind a mark in front, the library's places are characters off, and more so the longer the text.
    assert found.equal(at_once) or request.node.callspec.params["tokenizer"] == "llama"


@pytest.mark.parametrize(("length", "stride"), [(500, 100), (50_000, 49_999), (2, 1), (10**6, 10**5)])
@pytest.mark.parametrize("cut", [windows, document_windows])
def test_windows_are_those_of_the_whole(small, monkeypatch, cut, length, stride):
    documents = ["short", TEXT[:30_000] if length < 10 else TEXT, "", TEXT[1_000:9_000], "x"]
    in_parts = list(cut(documents, BYTES, length, stride))
    monkeypatch.setattr(encoding, "_LENGTH", 10**7)
    for found, wanted in itertools.zip_longest(in_parts, cut(documents, BYTES, length, stride)):
        assert (found.tokens_T.equal(wanted.tokens_T), found.words_T.equal(wanted.words_T)) == (True, True)
        assert found.first == wanted.first


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab=  \n\té😀1"), max_size=400), run=st.integers(0, 300))
def test_any_text_in_the_smallest_parts(text, run):
    text = text + "=" * run + text
    names = ("_LENGTH", "_SEARCHED", "_AROUND")
    sizes = {name: getattr(encoding, name) for name in names}
    try:
        vars(encoding).update(dict(zip(names, (90, 60, 20), strict=True)))
        parts = list(encode(text, BYTES))
    finally:
        vars(encoding).update(sizes)
    assert "".join(part.text for part in parts) == text
    assert b"".join(bytes(part.ids) for part in parts) == text.encode()


def test_one_word_of_any_length_is_cut_all_the_same(small):
    tokenizer = Tokenizer(models.BPE({"=": 0, "==": 1, "===": 2}, [("=", "="), ("==", "=")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    parts = list(encode("=" * 10_001, tokenizer))
    assert [len(part.text) for part in parts] == [3_000, 3_000, 3_000, 1_001]
    for part in parts:
        assert sum(token + 1 for token in part.ids) == len(part.text) == part.ends[-1]


def test_short_documents_are_encoded_whole(monkeypatch):
    texts = []

    def count(text: str, *given, **named) -> dict:
        texts.append(text)
        return BYTES(text, *given, **named)

    count.is_fast = True
    (part,) = encode(["a" * 100_000, "b" * 31_072], count)
    assert texts == [part.text]
    assert len(list(encode("a" * 131_073, count))) == 2


def test_a_large_file_is_read_no_further_than_is_needed(tmp_path):
    file = tmp_path / "large.txt"
    with file.open("w") as lines:
        for number in range(400_000):
            lines.write(f"line {number} of a large file\n")
    tracemalloc.start()
    row = next(token_rows(FileText([file]).in_pieces(seed=0), BYTES, 256))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bytes(row[1:].tolist()) == file.read_bytes()[:255]
    assert file.stat().st_size > 10e6
    assert peak < 120e6

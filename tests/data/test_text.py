import itertools
import json

import pyarrow
import pyarrow.parquet
import pytest

from keyreduce.data import text as text_module
from keyreduce.data.text import DatasetText, FileText, StdlibText, stdlib_documents, text_source
from keyreduce.errors import KeyreduceError

DOCUMENTS = ["one", "zwei é", "three\nlines\n", "四"]


@pytest.fixture
def folder(tmp_path):
    """A folder with one document in each kind of file, named so that their order is that of DOCUMENTS."""
    folder = tmp_path / "corpus"
    (folder / "d").mkdir(parents=True)
    (folder / "a.txt").write_text(DOCUMENTS[0])
    (folder / "b.jsonl").write_text(json.dumps({"text": DOCUMENTS[1], "id": 7}) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "text": [DOCUMENTS[2]]}), folder / "c.parquet")
    (folder / "d" / "e.MD").write_text(DOCUMENTS[3])
    (folder / "ignored.bin").write_bytes(b"\xff")
    return folder


def test_folder_is_read_in_order_and_recursively(folder):
    assert list(FileText([folder]).documents()) == DOCUMENTS


def test_files_are_read_in_the_order_given(folder):
    assert list(FileText([folder / "c.parquet", folder / "a.txt"]).documents()) == [DOCUMENTS[2], DOCUMENTS[0]]


def test_documents_are_streamed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "first"}\nnot JSON\n')
    assert next(FileText([file]).documents()) == "first"


def test_seed_shuffles_the_same_documents_the_same_way(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": str(n)}) + "\n" for n in range(50)))
    source = FileText([file])
    in_order = list(source.documents())
    shuffled = list(source.documents(seed=1))
    assert shuffled == list(source.documents(seed=1))
    assert sorted(shuffled) == sorted(in_order)
    assert shuffled not in (in_order, list(source.documents(seed=2)))


def test_shuffle_reads_no_further_than_its_buffer(monkeypatch):
    monkeypatch.setattr(text_module, "_SHUFFLE_BUFFER", 10)
    drawn = itertools.count()
    endless = (str(next(drawn)) for _ in itertools.repeat(None))
    first = list(itertools.islice(text_module._shuffled(endless, seed=0), 100))
    assert next(drawn) <= 111
    assert len(set(first)) == 100


def test_identity_follows_content_and_not_the_place(folder, tmp_path):
    before = FileText([folder]).identity
    moved = folder.rename(tmp_path / "elsewhere")
    assert FileText([moved]).identity == before
    (moved / "a.txt").write_text("two")
    assert FileText([moved]).identity != before


def test_identity_of_a_large_file_sees_its_end(tmp_path):
    file = tmp_path / "large.txt"
    file.write_bytes(b"x" * 300_000)
    before = FileText([file]).identity
    file.write_bytes(b"x" * 299_999 + b"y")
    assert FileText([file]).identity != before


def test_default_is_the_standard_library():
    source = text_source(default="heldout")
    assert next(source.documents()) == next(stdlib_documents("heldout"))
    assert source.identity == StdlibText("heldout").identity != StdlibText("calibration").identity
    assert source.describe()["split"] == "heldout"


def test_descriptions_are_json(folder):
    for source in (FileText([folder]), StdlibText("train"), DatasetText("name", "config", "split")):
        assert json.loads(json.dumps(source.describe())) == source.describe()


def test_dataset_is_streamed_by_name(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": ""}\n')
    source = text_source(dataset=str(tmp_path), default="train")
    assert list(source.documents()) == ["a", "b"]
    assert sorted(source.documents(seed=3)) == ["a", "b"]
    assert source.identity != DatasetText(str(tmp_path), split="test").identity


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text", r"a\.csv is of no kind that is read; give one of \.txt, .*\.parquet"),
        ("a.jsonl", '{"text": "x"}\n{"text"', r"a\.jsonl, line 2, is not JSON"),
        ("a.jsonl", '{"text": "x"}\n\n{"body": "x"}', r'a\.jsonl, line 3, has no string in the field "text"'),
        ("a.jsonl", '["text"]', r'a\.jsonl, line 1, has no string in the field "text"'),
        ("a.jsonl", '{"text": ""}', "the text is empty"),
        ("a.txt", "", "the text is empty"),
        ("a.txt", b"\xff\xfe", r"a\.txt is not UTF-8 text"),
        ("a.parquet", "PAR1", r"a\.parquet is not a parquet file, or is truncated"),
    ],
)
def test_bad_file_is_refused_in_one_line(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(KeyreduceError, match=message) as refusal:
        list(FileText([file]).documents())
    assert "\n" not in str(refusal.value)


def test_parquet_without_text_column_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(KeyreduceError, match=r'a\.parquet has no column "text" but id, body'):
        list(FileText([tmp_path]).documents())


def test_missing_path_and_folder_without_text_are_refused(tmp_path):
    with pytest.raises(KeyreduceError, match="there is no text file or folder .*missing"):
        FileText([tmp_path / "missing"])
    with pytest.raises(KeyreduceError, match="holds no text file"):
        FileText([tmp_path])


@pytest.mark.parametrize(
    ("config", "split", "message"), [("none", "train", "'none' not found"), (None, "none", "Bad split: none")]
)
def test_dataset_that_cannot_be_loaded_is_refused(tmp_path, config, split, message):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(KeyreduceError, match=message):
        DatasetText(str(tmp_path), config, split).documents()


def test_contradicting_options_are_refused(tmp_path):
    with pytest.raises(KeyreduceError, match="both given"):
        text_source([tmp_path], "name", default="train")
    with pytest.raises(KeyreduceError, match="give its name too"):
        text_source(split="test", default="train")

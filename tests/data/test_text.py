import itertools
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from keyreduce.data import text as text_module
from keyreduce.data.text import DatasetText, DocumentText, FileText, StdlibText, stdlib_documents, text_source
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
    first = list(itertools.islice(text_module.shuffled(endless, seed=0), 100))
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
        ("a.jsonl", '{"text": 5}', r'a\.jsonl, line 1, has no string in the field "text"'),
        ("a.jsonl", '{"text": "x", "meta": ' + "[" * 200_000, r"a\.jsonl, line 1, is nested too deeply to be read"),
        ("a.jsonl", '{"text": null}', "the text is empty"),
        ("a.txt", "\0\0", "the text is empty"),
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


@pytest.mark.parametrize(
    ("name", "content", "texts", "logged"),
    [
        ("a.jsonl", rb'{"text": "\ud83d\ude00"}', ["\U0001f600"], None),
        ("a.jsonl", rb'{"text": "\ud83d, \ude00"}', ["\ufffd, \ufffd"], "1 document with half a surrogate.*line 2"),
        ("a.jsonl", b'{"text": "x", "id": %s}' % (b"9" * 5_000), ["x"], None),
        ("a.jsonl", b'{"text": null}\n{"text": null}', [], r"2 documents without text left out .*line 2\)"),
        ("a.jsonl", b'\0\0\0\n{"text": "a\0b"}', ["ab"], r"2 documents with NUL bytes, which were left out.*line 2\)"),
        ("a.txt", b"a\0b" * 50_000, ["ab" * 50_000], r"1 document with NUL bytes.*a\.txt"),
        ("a.txt", b"x\r\ny", ["x\ny"], None),
    ],
)
def test_what_can_be_mended_is_and_counted(tmp_path, caplog, name, content, texts, logged):
    file = tmp_path / name
    file.write_bytes((b'{"text": "first"}\n' if name == "a.jsonl" else b"") + content)
    source = FileText([file])
    for _ in range(2):
        assert list(source.documents()) == ["first"] * (name == "a.jsonl") + texts
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (logged is not None)
    assert logged is None or re.search(logged, messages[0])


def test_null_row_of_a_table_is_left_out_and_counted(tmp_path, caplog):
    table = pyarrow.table({"text": ["a", None, "b"] * 200})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert list(FileText([tmp_path]).documents()) == ["a", "b"] * 200
    assert re.search(r"200 documents without text left out \(the first: .*a\.parquet, row 2\)", caplog.text)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(KeyreduceError, match=r"a\.parquet, row 1, has no string"):
        list(FileText([tmp_path]).documents())


def test_text_in_memory_is_mended_too(caplog):
    assert list(DocumentText(["a", "b\ud83d"]).documents()) == ["a", "b\ufffd"]
    assert "the first: document 2" in caplog.text


def test_dataset_that_breaks_off_is_refused_with_its_row(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n' * 3 + '{"text": ["b"]}\n')
    with pytest.raises(KeyreduceError, match=r"dataset '.*' ended after \d+ rows: |row 4 as drawn, has no string"):
        list(DatasetText(str(tmp_path)).documents())


def test_a_file_is_read_when_it_is_its_turn(tmp_path):
    """So that files which wait to be shuffled take no memory, and one may be larger than that."""
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:02} " * 100_000)
    documents = FileText([tmp_path]).in_pieces(seed=3)
    first = next(iter(next(documents)))
    assert len(first) < 300_000
    for file in tmp_path.iterdir():
        if not file.name.startswith(first[:2]):
            file.write_text("changed")
    assert [*map("".join, documents)] == ["changed"] * 19


def test_parquet_without_text_column_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(KeyreduceError, match=r'a\.parquet has no column "text" but id, body'):
        list(FileText([tmp_path]).documents())


def test_missing_path_and_folder_without_text_are_refused(tmp_path):
    with pytest.raises(KeyreduceError, match="there is no text file or folder .*missing"):
        FileText([tmp_path / "missing"])
    (tmp_path / "a.txt").symlink_to("nowhere/b.txt")
    for given in (tmp_path / "a.txt", tmp_path):
        with pytest.raises(KeyreduceError, match=r"a\.txt is a link to nowhere/b\.txt, which is not there"):
            FileText([given])
    (tmp_path / "a.txt").unlink()
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

"""Calibration and held-out text share no document."""

import json
from pathlib import Path

import pytest

from keyreduce.data.text import FileText, StdlibText
from keyreduce.errors import KeyreduceError
from keyreduce.recovery.overlap import refuse_overlap


def documents(path: Path, *texts: str) -> FileText:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return FileText([path])


A, B, C = ("a" * 50, "b" * 50, "c" * 50)


def test_the_same_text_is_refused(tmp_path):
    one, other = documents(tmp_path / "same.jsonl", A, B), FileText([tmp_path / "same.jsonl"])
    with pytest.raises(KeyreduceError, match="are the same"):
        refuse_overlap(one, other)


@pytest.mark.parametrize(("shared", "told"), [((A,), "1 document of"), ((A, B), "2 documents of")])
def test_a_document_of_both_is_refused(tmp_path, shared, told):
    one, other = documents(tmp_path / "one.jsonl", A, B), documents(tmp_path / "other.jsonl", C, *shared)
    with pytest.raises(KeyreduceError, match=told):
        refuse_overlap(one, other)


def test_a_file_under_another_name_is_refused(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(A)
    (tmp_path / "other" / "more.txt").write_text(B)
    with pytest.raises(KeyreduceError, match="1 document of"):
        refuse_overlap(*(FileText([tmp_path / name]) for name in ("one", "other")))


def test_other_text_and_stubs_pass(tmp_path):
    stub = "s" * 39
    one, other = documents(tmp_path / "one.jsonl", A, stub), documents(tmp_path / "other.jsonl", B, stub)
    refuse_overlap(one, other)


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_the_splits_that_are_the_defaults_pass(split):
    refuse_overlap(StdlibText(split), StdlibText("heldout"))

import hashlib
import re
import sysconfig
from pathlib import Path
from typing import get_args

from keyreduce.data.text import Split, split_of, stdlib_documents, stdlib_files


def test_splits_are_disjoint_and_their_union_is_the_library():
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for split in get_args(Split) for path in stdlib_files(split)]
    skipped = re.compile(r"(^|/)(site-packages|dist-packages|__pycache__|test|tests|idle_test)/")
    expected = {path for path in root.rglob("*.py") if not skipped.search(path.relative_to(root).as_posix())}
    assert len(files) == len(set(files))
    assert set(files) == expected


def test_shares_are_about_eight_one_one():
    counts = {split: len(stdlib_files(split)) for split in get_args(Split)}
    total = sum(counts.values())
    assert 0.75 < counts["train"] / total < 0.85
    assert 0.06 < counts["calibration"] / total < 0.14
    assert 0.06 < counts["heldout"] / total < 0.14


def test_split_of_a_path_never_changes():
    # The shipped models were trained on this split: a change would let them be measured on what they have seen.
    assert {path: split_of(path) for path in ("argparse.py", "inspect.py", "typing.py", "json/decoder.py")} == {
        "argparse.py": "calibration",
        "inspect.py": "heldout",
        "typing.py": "train",
        "json/decoder.py": "train",
    }
    digits = [int(hashlib.sha256(f"{n}.py".encode()).hexdigest()[:16], 16) % 10 for n in range(50)]
    assert [split_of(f"{n}.py") for n in range(50)] == [
        "calibration" if digit == 8 else "heldout" if digit == 9 else "train" for digit in digits
    ]


def test_documents_are_the_files_in_order():
    documents = list(stdlib_documents("calibration"))
    root = Path(sysconfig.get_path("stdlib"))
    files = stdlib_files("calibration")
    assert [path.relative_to(root).as_posix() for path in files] == sorted(
        path.relative_to(root).as_posix() for path in files
    )
    assert documents[0] == files[0].read_text(encoding="utf-8")
    assert (root / "argparse.py").read_text(encoding="utf-8") in documents


def test_undecodable_file_is_skipped(tmp_path, monkeypatch):
    names = [f"{n}.py" for n in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(b"\xff\xfe" if name == "0.py" else name.encode())
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    documents = [document for split in get_args(Split) for document in stdlib_documents(split)]
    assert sorted(documents) == sorted(names[1:])

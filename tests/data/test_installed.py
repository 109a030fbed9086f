from pathlib import Path
from typing import get_args

import pytest

from keyreduce.data.installed import InstalledText
from keyreduce.data.text import Split

SPLITS = get_args(Split)


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def lines(word: str, count: int = 20) -> str:
    return "".join(f"{word} of line {number}\n" for number in range(count))


@pytest.fixture
def root(tmp_path) -> Path:
    for number in range(100):
        written(tmp_path / f"package/part{number}/code.py", lines(f"code {number}"))
    return tmp_path


def test_each_file_is_in_one_split(root):
    files = [path for split in SPLITS for path in InstalledText(split, [root, root / "package"]).files()]
    assert len(files) == len(set(files)) == 100
    documents = [document for split in SPLITS for document in InstalledText(split, [root]).documents()]
    assert len(documents) == len(set(documents)) == 100
    counts = [len(InstalledText(split, [root]).files()) for split in SPLITS]
    assert counts[0] > 60 and min(counts) > 2


def test_copies_are_in_the_split_of_their_origin(root):
    # Another version of the same file, as packages bring along that carry others inside them, and the same content.
    for number in range(30):
        written(root / f"other/vendored/part{number}/code.py", lines(f"code {number}", 21))
        written(root / f"renamed/{number}.txt", lines(f"code {number}"))
    where = {path: split for split in SPLITS for path in InstalledText(split, [root]).files()}
    assert len(where) == 130
    for number in range(30):
        versions = [path for path in where if path.parts[-2:] == (f"part{number}", "code.py")]
        assert len(versions) + (root / f"renamed/{number}.txt" in where) == 2
        assert len({where[path] for path in versions}) == 1


def test_what_is_no_text_is_left_out(root):
    code = lines("code")
    for name, text in {
        "short.py": "x = 1\n",
        "long.py": code * 1000,
        "table.txt": "1 " * 5000,
        "nul.py": code + "\0",
        "picture.svg": code,
        ".hidden/code.py": lines("hidden"),
        "__pycache__/code.py": lines("cached"),
    }.items():
        written(root / "more" / name, text)
    (root / "more/latin.py").write_bytes(b"\xe9" + code.encode())
    (root / "more/link.py").symlink_to(root / "package/part1/code.py")
    assert sum(len(InstalledText(split, [root]).files()) for split in SPLITS) == 100


def test_order_does_not_follow_names(root):
    text = InstalledText("train", [root])
    assert text.files() != sorted(text.files())
    assert list(text.documents()) == list(InstalledText("train", [root]).documents())
    assert sorted(text.documents(seed=1)) == sorted(text.documents())
    assert InstalledText("heldout", [root]).identity != text.identity

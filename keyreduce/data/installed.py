"""Text that a machine has: source and documentation of the packages that are installed on it, split by file.

A machine for training has hundreds of megabytes of it. Nothing is downloaded, and nothing is redistributed.

A hash of a file's name and of the folder's that it lies in decides its split. So the copies of a package that others
bring along, of whatever version, lie in one split, file by file. Of files with the same content one is taken.
"""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, get_args

from keyreduce.data.text import Split, TextSource, shuffled, split_of

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".cu", ".c", ".cpp")
_SIZES = range(200, 200_001)  # bytes: neither a stub nor a table of data
_FEWEST_LINES = 5
_LONGEST_LINES = 150  # characters on average; what has more is data or generated
_SYSTEM = ("/usr/lib/python3", "/usr/include", "/usr/share", "/usr/local")
_SKIPPED = {"__pycache__", "node_modules"}
_READERS = 8  # threads


class InstalledText(TextSource):
    """One split of the text files below some folders, in the order of the hashes of their contents.

    That order is like a random one, and the same on every machine with these files: the beginning resembles the whole.

    Args:
        split: which split.
        roots: the folders; by default those of Python, of its packages, and those where a system keeps headers and
            documentation.
    """

    def __init__(self, split: Split, roots: Sequence[Path] | None = None):
        self.split: Split = split
        self.roots = tuple(default_roots() if roots is None else map(Path, roots))

    def describe(self) -> dict:
        return {"kind": "installed", "split": self.split, "roots": [str(root) for root in self.roots]}

    def files(self) -> list[Path]:
        """Return the files of this split; the first call in a process reads all files of all splits once."""
        return [file.path for file in _scan(self.roots)[self.split]]

    def _content(self) -> dict:
        return {**self.describe(), "files": [file.digest.hex() for file in _scan(self.roots)[self.split]]}

    def _stream(self, seed: int | None) -> Iterator[Iterable[str]]:
        return shuffled(((path.read_text(encoding="utf-8"),) for path in self.files()), seed)


def default_roots() -> list[Path]:
    """Return the folders of Python, of its packages, and of the system's headers and documentation."""
    python = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    paths = dict.fromkeys(Path(path).resolve() for path in (*python, *packages, *_SYSTEM))
    return [path for path in paths if path.is_dir()]


class _File(NamedTuple):
    digest: bytes
    path: Path


@lru_cache(maxsize=1)
def _scan(roots: tuple[Path, ...]) -> dict[Split, list[_File]]:
    """Return the files of each split, sorted by the hash of their contents."""
    paths = sorted(_candidates(roots))
    # Of equal files the first one counts, by which name, folder and split do not depend on the order of a disk.
    first: dict[bytes, Path] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for path, digest in zip(paths, pool.map(_digest, paths), strict=True):
            if digest is not None:
                first.setdefault(digest, path)
    found: dict[Split, list[_File]] = {split: [] for split in get_args(Split)}
    for digest, path in sorted(first.items()):
        found[split_of("/".join(path.parts[-2:]))].append(_File(digest, path))
    return found


def _candidates(roots: Iterable[Path]) -> set[Path]:
    """Return the text files below the folders; where a folder lies in another one, each file once."""
    found = set()
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _SKIPPED and not name.startswith(".")]
            found |= {Path(folder, name) for name in names if name.endswith(SUFFIXES)}
    return found


def _digest(path: Path) -> bytes | None:
    """Return a hash of a file's content, or None if it is not a text that is worth reading."""
    try:
        if path.is_symlink() or path.stat().st_size not in _SIZES:
            return None
        content = path.read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError):
        return None
    lines = text.count("\n") + 1
    if lines < _FEWEST_LINES or len(text) > _LONGEST_LINES * lines or "\0" in text:
        return None
    return hashlib.blake2b(content, digest_size=16).digest()

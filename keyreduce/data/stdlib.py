"""The default text: the source of the Python standard library on the machine that runs this.

Every machine with Python has it, and nothing is redistributed. The split follows a hash of each file's relative path,
so a file that is held out under one version of Python is held out under every other.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "heldout"]

# Installed packages are not the standard library, and not every machine has its test suite.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def split_of(relative_path: str) -> Split:
    """Return the split of a file, by its POSIX path below the library's folder: 8 of 10 parts train."""
    part = int.from_bytes(hashlib.sha256(relative_path.encode()).digest()[:8], "big") % 10
    return {8: "calibration", 9: "heldout"}.get(part, "train")


def stdlib_files(split: Split) -> list[Path]:
    """Return the ``*.py`` files of one split, sorted by their path below the library's folder."""
    root = Path(sysconfig.get_path("stdlib"))
    chosen = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        relative_paths = ((Path(folder) / name).relative_to(root).as_posix() for name in names if name.endswith(".py"))
        chosen += [path for path in relative_paths if split_of(path) == split]
    return [root / path for path in sorted(chosen)]


def stdlib_documents(split: Split) -> Iterator[str]:
    """Yield the text of each file of one split, in the order of `stdlib_files`; what is not UTF-8 is skipped."""
    for path in stdlib_files(split):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue

from collections.abc import Callable
from pathlib import Path

import pytest
from cuts import cut, plan_of

from keyreduce.checkpoint.folder import open_folder


@pytest.fixture
def pruned(tmp_path: Path) -> Callable[..., Path]:
    """A function: a checkpoint, its key channels pruned to a number, or other targets too, in a new folder."""

    def prune(source: Path, key: int | None = None, *, method: str = "random", name: str = "pruned", **targets) -> Path:
        checkpoint = open_folder(source)
        keep = ({} if key is None else {"key": key}) | targets
        return cut(checkpoint, plan_of(checkpoint, keep, method), tmp_path / name)

    return prune

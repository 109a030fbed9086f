from collections.abc import Callable
from pathlib import Path

import pytest

from keyreduce.checkpoint.folder import open_folder
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.prune import make_plan, write_pruned


@pytest.fixture
def pruned(tmp_path: Path) -> Callable[..., Path]:
    """A function: a checkpoint, pruned by a method that needs no calibration, in a new folder."""

    def prune(source: Path, keep: int, *, method: str = "random", seed: int = 3, name: str = "pruned") -> Path:
        checkpoint = open_folder(source)
        inputs = {"source": checkpoint.identity, "method": method, "keep": keep, "seed": seed}
        plan = make_plan(checkpoint, METHODS[method], keep, seed=seed, statistics=None, inputs=inputs)
        write_pruned(checkpoint, plan, tmp_path / name, dense=str(source))
        return tmp_path / name

    return prune

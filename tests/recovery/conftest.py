from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import save
from transformers import PreTrainedModel

from keyreduce.checkpoint.folder import open_folder
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.planning import make_plan
from keyreduce.pruning.prune import write_pruned


@pytest.fixture
def pruned_pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A function: a model's folder, and one with so many channels or heads of each target kept, by the L2 norm."""

    def make(model: PreTrainedModel, **keep: int) -> tuple[Path, Path]:
        dense = open_folder(save(model, tmp_path / "dense"))
        layers = range(model.config.num_hidden_layers)
        numbers = {target: dict.fromkeys(layers, number) for target, number in keep.items()}
        inputs = {"method": "l2", "target": list(keep)}
        plan = make_plan(dense, METHODS["l2"], numbers, seed=0, statistics=None, inputs=inputs)
        write_pruned(dense, plan, tmp_path / "pruned", dense=str(dense.path))
        return dense.path, tmp_path / "pruned"

    return make

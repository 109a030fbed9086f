"""A sweep run: what cannot be is refused for all models before the first of them is worked on."""

from pathlib import Path

import pytest
import torch
from tiny_models import build, edit_config, save

from keyreduce.calibration.run import Settings
from keyreduce.data.text import text_source
from keyreduce.errors import KeyreduceError
from keyreduce.sweep import run
from keyreduce.sweep.recipe import Cell, Recipe


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function: run a sweep of which nothing may be worked on."""
    for name in ("calibrate", "load_model", "evaluate", "make_plan", "write_pruned"):
        monkeypatch.setattr(run, name, lambda *args, name=name, **options: pytest.fail(f"{name} was called"))
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(name)

    def refused(models: list, cell: Cell, heldout: str = "two.txt") -> str:
        recipe = Recipe([str(model) for model in models], Settings(1, 1, 8), Settings(1, 1, 8), [L1, cell])
        with pytest.raises(KeyreduceError) as caught:
            run.run_sweep(
                recipe,
                calibration=text_source([tmp_path / "one.txt"], default="calibration"),
                heldout=text_source([tmp_path / heldout], default="heldout"),
                seed=0,
                device=torch.device("cpu"),
                dtype=torch.float32,
            )
        return str(caught.value)

    return refused


L1 = Cell("key", "l1", {}, 0.5)
PCA = Cell("key", "pca", {"include_queries": False}, 0.5)


def test_texts_that_are_the_same(sweep, tiny_folder):
    assert "calibration and held-out text are the same" in sweep([tiny_folder("delta_net")], L1, heldout="one.txt")


def test_a_later_model_that_a_method_cannot_prune(sweep, tiny_folder, tmp_path):
    other = save(build("delta_net", qk_norm="sum"), tmp_path / "sum")
    assert "pca rotates queries and keys, and qk_norm 'sum'" in sweep([tiny_folder("delta_net"), other], PCA)


def test_a_later_model_that_is_none(sweep, tiny_folder, tiny_copy):
    first = tiny_folder("delta_net")
    assert "there is no model 'nonsense'" in sweep([first, "nonsense"], L1)
    assert "has no config.json" in sweep([first, Path(__file__).parent], L1)
    other = tiny_copy()
    edit_config(other, model_type="llama")
    assert "keyreduce knows" in sweep([first, other], L1)
    edit_config(other, model_type="delta_net", attn={"layers": [0, 1], "num_heads": 2})
    assert "has no layer with a recurrent state" in sweep([first, other], L1)


def test_a_target_that_a_method_has_not(sweep, tiny_folder):
    assert "--method pca is for --target key alone" in sweep([tiny_folder("delta_net")], PCA._replace(target="value"))


"""The plan of a sweep: what cannot be is refused for all models at once, and what decides a result names its folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import build, edit_config, save

from keyreduce.calibration.run import Settings
from keyreduce.data.text import text_source
from keyreduce.errors import KeyreduceError
from keyreduce.sweep.recipe import Cell, Recipe, Recovery, Timing
from keyreduce.sweep.run import plan_sweep
from keyreduce.sweep.runs import CALIBRATION, DENSE, PRUNED, slug

L1 = Cell("key", "l1", {}, 0.5)
PCA = Cell("key", "pca", {"include_queries": False}, 0.5)
TAYLOR = Cell("key", "taylor", {"form": "squared"}, 0.25, "least-squares")
SMALL = Settings(1, 2, 8)


def recipe_of(models: list, *cells: Cell, **changes) -> Recipe:
    recipe = Recipe([str(model) for model in models], [0], SMALL, SMALL, False, True, Recovery(1, 2, 8), None, [*cells])
    return replace(recipe, **changes)


@pytest.fixture
def plan(tmp_path):
    """A function: the runs of a recipe, on texts of a few words."""

    def of(recipe: Recipe, *, heldout: str = "two", calibration: str = "one", **options):
        for name, words in (("one", calibration), ("two", heldout)):
            (tmp_path / f"{name}.txt").write_text(words * 20)
        return plan_sweep(
            recipe,
            tmp_path / "sweep",
            calibration=text_source([tmp_path / "one.txt"], default="calibration"),
            heldout=text_source([tmp_path / "two.txt"], default="heldout"),
            **{"device": torch.device("cpu"), "dtype": torch.float32} | options,
        )

    return of


@pytest.fixture
def refused(plan):
    """A function: the line with which a recipe is refused."""

    def line(models: list, *cells: Cell, **options) -> str:
        with pytest.raises(KeyreduceError) as caught:
            plan(recipe_of(models, L1, *cells), **options)
        return str(caught.value)

    return line


def test_texts_that_overlap(refused, tiny_folder):
    told = refused([tiny_folder("delta_net")], heldout="the same words ", calibration="the same words ")
    assert "of the held-out text is in the calibration text too" in told


def test_no_model(refused):
    assert "the recipe names no models; give them with --model" in refused([])


def test_a_later_model_that_a_method_cannot_prune(refused, tiny_folder, tmp_path):
    other = save(build("delta_net", qk_norm="sum"), tmp_path / "sum")
    assert "pca rotates queries and keys, and qk_norm 'sum'" in refused([tiny_folder("delta_net"), other], PCA)


def test_a_later_model_that_is_none(refused, tiny_folder, tiny_copy):
    first = tiny_folder("delta_net")
    assert "there is no model 'nonsense'" in refused([first, "nonsense"])
    assert "has no config.json" in refused([first, Path(__file__).parent])
    other = tiny_copy()
    edit_config(other, model_type="llama")
    assert "keyreduce knows" in refused([first, other])
    edit_config(other, model_type="delta_net", attn={"layers": [0, 1], "num_heads": 2})
    assert "has no layer with a recurrent state" in refused([first, other])


def test_a_target_that_a_method_has_not(refused, tiny_folder):
    assert "--method pca is for --target key alone" in refused([tiny_folder("delta_net")], PCA._replace(target="value"))


def test_one_calibration_serves_all_unless_each_seed_has_its_own(plan, tiny_folder):
    models = [tiny_folder("delta_net"), tiny_folder("gated_deltanet")]
    runs = plan(recipe_of(models, L1, TAYLOR, seeds=[4, 2]))
    kinds = [run.kind for run in runs]
    assert [kinds.count(kind) for kind in (DENSE, CALIBRATION, PRUNED)] == [2, 2, 2 * 2 * 2]
    assert [run.about["seed"] for run in runs if run.kind == CALIBRATION] == [4, 4]
    assert all("--gradients" in run.steps["calibrate"] for run in runs if run.kind == CALIBRATION)
    runs = plan(recipe_of(models, L1, TAYLOR, seeds=[4, 2], per_seed=True))
    assert [run.about["seed"] for run in runs if run.kind == CALIBRATION] == [4, 2, 4, 2]
    named = {run.folder: run for run in runs}
    assert len(named) == len(runs)
    for run in runs:
        if run.kind == PRUNED:
            (needed,) = run.needs
            assert named[needed].about == {"model": run.about["model"], "seed": run.about["seed"]}
            calibration = run.steps["prune"][run.steps["prune"].index("--calibration") + 1]
            assert Path(calibration).parent.as_posix().endswith(needed)


def test_what_decides_a_result_names_its_folder_and_nothing_else_does(plan, tiny_folder):
    model = tiny_folder("delta_net")

    def folder(cell: Cell = L1, *, options=None, **changes) -> str:
        (run,) = [run for run in plan(recipe_of([model], cell, **changes), **(options or {})) if run.kind == PRUNED]
        return run.folder

    first = folder()
    others = [
        folder(L1._replace(ratio=0.25)),
        folder(L1._replace(target="value")),
        folder(L1._replace(repair="least-squares")),
        folder(L1._replace(repair="least-squares"), recovery=Recovery(9, 9, 9)),
        folder(Cell("key", "rrqr", {"f": 1.5, "permute": False}, 0.5)),
        folder(Cell("key", "rrqr", {"f": 2.0, "permute": False}, 0.5)),
        folder(seeds=[1]),
        folder(calibration=SMALL._replace(num_batches=2)),
        folder(heldout=SMALL._replace(seq_len=16)),
        folder(timing=Timing(("mixer",))),
        folder(timing=Timing(("mixer",), rounds=3)),
        folder(convert=False),
        folder(options={"dtype": torch.bfloat16}),
        folder(options={"heldout": "other"}),
        folder(options={"calibration": "other"}),
    ]
    assert len({first, *others}) == 1 + len(others)
    assert folder(recovery=Recovery(9, 9, 9)) == first  # nothing is repaired there
    both = plan(recipe_of([model], L1, TAYLOR, seeds=[0, 7]))
    assert first in {run.folder for run in both}  # a longer recipe does not do it again


def test_the_commands_of_a_run(plan, tiny_folder):
    model = tiny_folder("delta_net")
    timing = Timing(("mixer", "decode"), 3, 4, 5, (6, 7))
    recipe = recipe_of([model], TAYLOR, seeds=[9], timing=timing, recovery=Recovery(1, 2, 8, 11))
    (run,) = [run for run in plan(recipe) if run.kind == PRUNED]
    assert list(run.steps) == ["prune", "recover", "convert", "benchmark", "eval"]

    def says(step: str, *words: object) -> bool:
        return " ".join(map(str, words)) in " ".join(run.steps[step])

    assert says("prune", "--model", model, "--method taylor --target key --ratio 0.25 --seed 9")
    assert says("prune", "--set form=squared")
    assert says("recover", "--mode least-squares") and not says("recover", "--steps")
    assert says("recover", "--num-batches 1 --batch-size 2 --seq-len 8 --seed 9 --text")
    assert says("recover", "--repeats 0.125")
    assert says("benchmark", "--mixer --decode --batch-size 3 --seq-len 4 --rounds 5 --decode-batch-sizes 6,7")
    assert says("eval", "--num-batches 1 --batch-size 2 --seq-len 8 --text")
    # What one step writes is what the next ones read.
    written = {step: run.steps[step][run.steps[step].index("--output") + 1] for step in ("prune", "recover")}
    assert says("recover", "--compressed", written["prune"])
    assert says("convert", "convert-dcp", written["recover"])
    assert says("benchmark", "--compressed", written["recover"])
    assert says("eval", "--model", written["recover"])
    reconstructed = recipe_of([model], TAYLOR._replace(repair="reconstruct"), recovery=Recovery(1, 2, 8, 11))
    run = plan(reconstructed)[-1]
    assert says("recover", "--mode reconstruct") and says("recover", "--steps 11")


def test_folders_of_models_of_one_name_differ(plan, tiny_copy, tmp_path):
    one, other = tiny_copy("a/model"), tiny_copy("b/model")
    runs = plan(recipe_of([one, other], L1))
    assert {run.about["model"] for run in runs} == {str(one), str(other)}


def test_slugs_are_names_of_folders():
    assert slug("a/b c", "key+value", "taylor (form squared)", 0.25) == "a-b-c-key+value-taylor-form-squared-0.25"
    assert "/" not in slug("../..", "\0")
    assert len(slug("x" * 500)) == 120

"""The plan of a sweep: what cannot be is refused for all models at once, and what decides a result names its folder."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import build, edit_config, save

from keyreduce.api.benchmark import BenchmarkRequest
from keyreduce.api.calibrate import CalibrateRequest
from keyreduce.api.convert import ConvertRequest
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.api.prune import PruneRequest
from keyreduce.api.recover import RecoverRequest
from keyreduce.data.text import text_source
from keyreduce.errors import KeyreduceError
from keyreduce.sweep.recipe import Combination, Recipe
from keyreduce.sweep.results import CALIBRATION, DENSE, PRUNED
from keyreduce.sweep.run import plan_sweep, slug

L1 = PruneRequest(method="l1", ratio=0.5)
PCA = PruneRequest(method="pca", ratio=0.5)
TAYLOR = PruneRequest(method="taylor", form="squared", ratio=0.25, recover="least-squares")
SMALL = {"num_batches": 1, "batch_size": 2, "seq_len": 8}


def recipe_of(models: list, *requests: PruneRequest, **changes) -> Recipe:
    recipe = Recipe(
        path=Path("recipe.toml"),
        models=tuple(map(str, models)),
        seeds=(0,),
        convert=True,
        per_seed=False,
        calibration=CalibrateRequest(**SMALL),
        heldout=EvaluateRequest(**SMALL),
        recover=RecoverRequest(**SMALL),
        benchmark=None,
        combinations=[Combination(request) for request in requests],
    )
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
            **{"device": "cpu", "dtype": "float32"} | options,
        )

    return of


@pytest.fixture
def refused(plan):
    """A function: the line with which a recipe is refused."""

    def line(models: list, *requests: PruneRequest, **options) -> str:
        with pytest.raises(KeyreduceError) as caught:
            plan(recipe_of(models, L1, *requests), **options)
        return str(caught.value)

    return line


def test_texts_that_overlap(refused, tiny_folder):
    told = refused([tiny_folder("delta_net")], heldout="the same words ", calibration="the same words ")
    assert "of the held-out text is in the calibration text too" in told


def test_no_model(refused):
    assert "recipe.toml names no models; name them in its list, or give `model`" in refused([])


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
    told = refused([tiny_folder("delta_net")], replace(PCA, target="value"))
    assert "recipe.toml: prune.methods pca is for prune.target key alone" in told


def test_a_share_that_there_is_not(refused, tiny_folder):
    for ratio in (1, -0.5):
        told = refused([tiny_folder("delta_net")], replace(L1, ratio=ratio))
        assert f"recipe.toml: prune.ratios is {ratio}; it is the share to remove, at least 0 and below 1" in told


def test_one_calibration_serves_all_unless_each_seed_has_its_own(plan, tiny_folder):
    models = [tiny_folder("delta_net"), tiny_folder("gated_deltanet")]
    runs = plan(recipe_of(models, L1, TAYLOR, seeds=(4, 2)))
    kinds = [run.kind for run in runs]
    assert [kinds.count(kind) for kind in (DENSE, CALIBRATION, PRUNED)] == [2, 2, 2 * 2 * 2]
    assert [run.about["seed"] for run in runs if run.kind == CALIBRATION] == [4, 4]
    assert all(run.steps["calibrate"].gradients for run in runs if run.kind == CALIBRATION)
    runs = plan(recipe_of(models, L1, TAYLOR, seeds=(4, 2), per_seed=True))
    assert [run.about["seed"] for run in runs if run.kind == CALIBRATION] == [4, 2, 4, 2]
    named = {run.folder: run for run in runs}
    assert len(named) == len(runs)
    for run in runs:
        if run.kind == PRUNED:
            (needed,) = run.needs
            assert named[needed].about == {"model": run.about["model"], "seed": run.about["seed"]}
            assert run.steps["prune"].calibration.parent.as_posix().endswith(needed)


def test_what_decides_a_result_names_its_folder_and_nothing_else_does(plan, tiny_folder):
    model = tiny_folder("delta_net")

    def folder(request: PruneRequest = L1, *, options=None, **changes) -> str:
        runs = plan(recipe_of([model], request, **changes), **(options or {}))
        (run,) = [run for run in runs if run.kind == PRUNED]
        return run.folder

    first, other_recovery = folder(), RecoverRequest(num_batches=9)
    others = [
        folder(replace(L1, ratio=0.25)),
        folder(replace(L1, target="value")),
        folder(replace(L1, recover="least-squares")),
        folder(replace(L1, recover="least-squares"), recover=other_recovery),
        folder(replace(L1, multiple_of=2)),
        folder(PruneRequest(method="rrqr", ratio=0.5)),
        folder(PruneRequest(method="rrqr", ratio=0.5, f=2)),
        folder(seeds=(1,)),
        folder(calibration=CalibrateRequest(**SMALL | {"num_batches": 2})),
        folder(heldout=EvaluateRequest(**SMALL | {"seq_len": 16})),
        folder(benchmark=BenchmarkRequest(mixer=True)),
        folder(benchmark=BenchmarkRequest(mixer=True, rounds=3)),
        folder(convert=False),
        folder(options={"dtype": "bfloat16"}),
        folder(options={"heldout": "other"}),
        folder(options={"calibration": "other"}),
    ]
    assert len({first, *others}) == 1 + len(others)
    assert folder(recover=other_recovery) == first  # nothing is repaired there
    both = plan(recipe_of([model], L1, TAYLOR, seeds=(0, 7)))
    assert first in {run.folder for run in both}  # a longer recipe does not do it again


def test_the_requests_of_a_run(plan, tiny_folder, tmp_path):
    model = tiny_folder("delta_net")
    timing = BenchmarkRequest(mixer=True, decode=True, batch_size=3, seq_len=4, rounds=5, decode_batch_sizes=(6, 7))
    recipe = recipe_of([model], TAYLOR, seeds=(9,), benchmark=timing, recover=RecoverRequest(**SMALL, steps=11))
    (run,) = [run for run in plan(recipe) if run.kind == PRUNED]
    assert list(run.steps) == ["prune", "recover", "convert", "benchmark", "eval"]
    prune, recover, convert, benchmark, evaluate = run.steps.values()
    calibration, heldout = (tmp_path / "one.txt",), (tmp_path / "two.txt",)
    folder = tmp_path / "sweep" / run.folder
    cut, checkpoint = folder / "cut", folder / "checkpoint"
    places = {"model": str(model), "output": cut, "calibration": prune.calibration}
    assert prune == replace(TAYLOR, recover=None, seed=9, device="cpu", **places)
    # What one step writes is what the next ones read. Least squares takes no steps.
    places = {"model": str(model), "compressed": str(cut), "output": checkpoint, "text": calibration}
    assert recover == RecoverRequest(mode="least-squares", **SMALL, seed=9, device="cpu", **places)
    assert convert == ConvertRequest(source=str(checkpoint), destination=folder / "dcp")
    places = {"model": str(model), "compressed": str(checkpoint), "output": folder / "benchmark.json"}
    assert benchmark == replace(timing, device="cpu", dtype="float32", overwrite=True, **places)
    places = {"model": str(checkpoint), "work": folder, "output": folder / "eval.json", "text": heldout}
    assert evaluate == EvaluateRequest(**SMALL, device="cpu", dtype="float32", overwrite=True, **places)
    reconstructed = replace(TAYLOR, recover="reconstruct")
    run = plan(recipe_of([model], reconstructed, recover=RecoverRequest(**SMALL, steps=11)))[-1]
    assert (run.steps["recover"].mode, run.steps["recover"].steps) == ("reconstruct", 11)


def test_auto_is_planned_as_the_mode_that_it_is(plan, tiny_folder):
    auto, recover = replace(TAYLOR, recover="auto"), RecoverRequest(**SMALL, steps=11)
    runs = plan(recipe_of([tiny_folder("delta_net")], auto, TAYLOR, recover=recover))
    (run,) = [run for run in runs if run.kind == PRUNED]  # on a CPU both are the same
    assert (run.about["repair"], run.steps["recover"].mode) == ("least-squares", "least-squares")
    runs = plan(recipe_of([tiny_folder("delta_net")], auto, TAYLOR, recover=recover), device="cuda")
    reconstructed, least = [run for run in runs if run.kind == PRUNED]
    assert (reconstructed.about["repair"], reconstructed.steps["recover"].steps) == ("reconstruct", 11)
    assert least.about["repair"] == "least-squares"


def test_folders_of_models_of_one_name_differ(plan, tiny_copy, tmp_path):
    one, other = tiny_copy("a/model"), tiny_copy("b/model")
    runs = plan(recipe_of([one, other], L1))
    assert {run.about["model"] for run in runs} == {str(one), str(other)}


def test_slugs_are_names_of_folders():
    assert slug("a/b c", "key+value", "taylor (form squared)", 0.25) == "a-b-c-key+value-taylor-form-squared-0.25"
    assert "/" not in slug("../..", "\0")
    assert len(slug("x" * 500)) == 120

"""``keyreduce sweep`` as a user runs it: the figures of the single commands, resumed, refused and told."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_models import edit_config, edit_tensors

from keyreduce.api import worker
from keyreduce.processes import Job, Outcome
from keyreduce.sweep import launchers

RECIPE = """
models = ["nonsense"]
convert = {convert}
calibration = {{ num_batches = 1, batch_size = 2, seq_len = 32 }}
heldout = {{ num_batches = 1, batch_size = 3, seq_len = 64 }}
{more}
prune = [{{ target = "{target}", ratios = {ratios}, methods = {methods}, repairs = {repairs} }}]
"""
SIZES = ("--num-batches", 1, "--batch-size", 2, "--seq-len", 32)
QUERY = "model.layers.1.attn.q_proj.weight"


@pytest.fixture
def recipe(tmp_path):
    """A function: the path of a recipe."""

    def write(more="", *, convert="false", target="key", ratios=(0.5,), methods=("l1",), repairs=("none",)) -> Path:
        lists = {"ratios": list(ratios), "methods": list(methods), "repairs": list(repairs)}
        told = {name: json.dumps(values) for name, values in lists.items()}
        path = tmp_path / "recipe.toml"
        path.write_text(RECIPE.format(more=more, convert=convert, target=target, **told))
        return path

    return write


@pytest.fixture
def in_process(monkeypatch):
    """Runs are done in this process, which has imported everything; returns the numbers of runs, job by job."""
    done: list[int] = []

    def launch(jobs: Sequence[Job]) -> list[Outcome]:
        for job in jobs:
            folders = [Path(argument) for argument in job.argv[3:]]
            done.append(len(folders))
            worker.do_folders(folders)
        return [Outcome(job, 0, 0.0, "") for job in jobs]

    monkeypatch.setattr(launchers, "launcher_named", lambda name, *, jobs, device: (launch, 1))
    return done


def figures(entry: dict) -> tuple[float, float]:
    return entry["perplexity_per_token"], entry["bits_per_byte"]


@pytest.mark.parametrize(("model_type", "target"), [("delta_net", "key"), ("gated_deltanet", "value")])
def test_a_sweep_measures_what_prune_and_eval_do(keyreduce, tiny_folder, recipe, in_process, model_type, target):
    """A model on the command line takes the place of those of the recipe; figures are the same to the last digit."""
    folder, methods = tiny_folder(model_type), ["energy", "random"]
    path = recipe(target=target, ratios=[0.5, 0.25], methods=methods)
    report = keyreduce("sweep", path, "--model", folder, "--seed", 3, "--json").json()
    assert [(row["method"], row["ratio"]) for row in report["rows"]] == [(m, r) for m in methods for r in (0.5, 0.25)]
    assert (report["failed"], report["waiting"]) == ({}, [])
    model = ("--model", folder)
    assert keyreduce("calibrate", *model, *SIZES, "--seed", 3).code == 0
    for row in report["rows"]:
        cut = ("--method", row["method"], "--target", target, "--ratio", row["ratio"], "--seed", 3)
        assert keyreduce("prune", *model, *cut, "--overwrite").code == 0
        measured = keyreduce("eval", "--num-batches", 1, "--batch-size", 3, "--seq-len", 64, "--json").json()["models"]
        dense, pruned = map(figures, measured)
        (of_sweep,) = report["dense"].values()
        assert (of_sweep["perplexity"], of_sweep["bits_per_byte"]) == dense
        assert (row["perplexity"]["mean"], row["bits_per_byte"]["mean"]) == pruned
        assert row["increase"]["mean"] == pytest.approx(pruned[0] / dense[0] - 1)
        assert row["state"] == pytest.approx(1 - row["ratio"])
    # With --json the table is on stderr; without, it is what stdout gets, and nothing is done anew.
    in_process.clear()
    again = keyreduce("sweep", path, "--model", folder, "--seed", 3)
    assert in_process == []
    assert again.out.startswith(f"**{model_type} (dense: perplexity ")
    assert len(re.findall(rf"^\| {target} \| (energy|random) \|", again.out, flags=re.MULTILINE)) == 4


def test_a_sweep_without_a_recipe_runs_the_quick_one(keyreduce, monkeypatch):
    """Its runs are counted, and not done."""

    def launch(jobs: Sequence[Job]) -> list[Outcome]:
        return [Outcome(job, 1, 0.0, "not done here") for job in jobs]

    monkeypatch.setattr(launchers, "launcher_named", lambda name, *, jobs, device: (launch, 1))
    result = keyreduce("sweep")
    assert result.code == 2 and "not done here" in result.err
    runs = json.loads(Path("keyreduce-out/sweep/sweep.json").read_text())["runs"]
    assert len([run for run in runs if run["kind"] == "pruned"]) == 2 * 3 * 3


def test_a_run_leaves_plan_log_and_figures_and_no_checkpoint(keyreduce, tiny_folder, recipe, in_process):
    timing = 'benchmark = { kinds = ["mixer"], batch_size = 1, seq_len = 8, rounds = 1 }'
    path, model = recipe(timing, convert="true"), ("--model", tiny_folder("delta_net"))
    report = keyreduce("sweep", path, *model, "--output", "out", "--json").json()
    (run,) = Path("out/runs").iterdir()
    assert {path.name for path in run.iterdir()} == {
        "task.json", "log.txt", "result.json", "keyreduce.json", "benchmark.json", "eval.json",
    }  # fmt: skip
    steps = json.loads((run / "result.json").read_text())["steps"]
    assert list(steps) == ["prune", "convert", "benchmark", "eval"]
    assert steps["convert"]["result"]["made"]
    assert [step["verb"] for step in steps.values()] == ["prune", "convert", "benchmark", "evaluate"]
    assert all(step["seconds"] > 0 for step in steps.values())
    assert report["rows"][0]["speedups"]["mixer"]["mean"] > 0
    assert "$ keyreduce prune {" in (run / "log.txt").read_text()
    written = {path.name for path in Path("out").iterdir() if path.is_file() and not path.name.startswith(".")}
    assert written == {
        "sweep.json", "table.md", "table.csv", "table.tex", "table.html", "perplexity.png", "pareto.png",
    }  # fmt: skip
    assert keyreduce("sweep", path, *model, "--output", "out", "--overwrite", "--keep-checkpoints").code == 0
    assert (run / "checkpoint" / "model.safetensors").is_file() and (run / "dcp").is_dir()
    assert keyreduce("verify", run / "checkpoint").code == 0


def test_seeds_may_draw_their_own_calibration_text(keyreduce, tiny_folder, recipe, in_process):
    model, path = ("--model", tiny_folder("delta_net")), recipe(methods=["rrqr"], ratios=[0.75])
    path.write_text(path.read_text().replace("seq_len = 32 }", "seq_len = 32, per_seed = true }"))
    (row,) = keyreduce("sweep", path, *model, "--seed", 1, "--seed", 2, "--json").json()["rows"]
    assert row["seeds"] == 2
    costs = []
    for seed in (1, 2):
        assert keyreduce("calibrate", *model, *SIZES, "--seed", seed, "--overwrite").code == 0
        assert keyreduce("prune", *model, "--method", "rrqr", "--ratio", 0.75, "--seed", seed, "--overwrite").code == 0
        sizes = ("--num-batches", 1, "--batch-size", 3, "--seq-len", 64)
        costs.append(figures(keyreduce("eval", *sizes, "--json").json()["models"][1])[0])
    assert row["perplexity"]["mean"] == pytest.approx(sum(costs) / 2)
    assert row["perplexity"]["spread"] == pytest.approx(abs(costs[0] - costs[1]) / 2**0.5)


def test_repairs_are_those_of_recover(keyreduce, tiny_folder, recipe, in_process):
    model, path = ("--model", tiny_folder("delta_net")), recipe(repairs=["none", "least-squares"])
    report = keyreduce("sweep", path, *model, "--json").json()
    assert report["failed"] == {}
    plain, repaired = report["rows"]
    assert (plain["repair"], repaired["repair"]) == ("none", "least-squares")
    assert keyreduce("prune", *model, "--method", "l1", "--ratio", 0.5).code == 0
    assert keyreduce("recover", "--mode", "least-squares", *SIZES, "--output", "repaired").code == 0
    sizes = ("--num-batches", 1, "--batch-size", 3, "--seq-len", 64)
    for row, made in ((plain, "keyreduce-out/pruned"), (repaired, "repaired")):
        measured = keyreduce("eval", "--model", made, "--work", "empty", *sizes, "--json").json()["models"][-1]
        assert row["perplexity"]["mean"] == figures(measured)[0]


def test_a_model_that_is_damaged_fails_alone_in_processes(
    keyreduce, python, tiny_folder, tiny_copy, recipe, monkeypatch
):
    monkeypatch.setattr("sys.executable", python)
    other = tiny_copy("damaged")
    edit_tensors(other, lambda tensors: tensors[QUERY].fill_(float("nan")))
    monkeypatch.setenv("PRUNING_RATIO", "0.9")  # is for prune, and not for the runs of a sweep
    models = ("--model", tiny_folder("delta_net"), "--model", other)
    result = keyreduce("sweep", recipe(), *models)
    assert result.code == 1
    assert len(re.findall(r"^failed: damaged, .*NaN or inf", result.err, flags=re.MULTILINE)) == 3
    assert "failed: damaged, 50% of key by l1, seed 0: its calibration failed" in result.err
    assert "| key | l1 |  | 50% |" in result.out and "Failed:" in result.out
    page = Path("keyreduce-out/sweep/table.html").read_text()
    assert "NaN or inf" in page


def test_what_cannot_be_is_refused_before_anything_is_written(keyreduce, tiny_folder, tiny_copy, recipe, tmp_path):
    def refused(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = keyreduce("sweep", *arguments)
        assert (result.code, result.out) == (2, "")
        (line,) = result.err.splitlines()
        assert sorted(tmp_path.rglob("*")) == before
        return line

    path, other = recipe(), tiny_copy()
    (tmp_path / "text.txt").write_text("some words, and enough of them to be told from a licence line")
    models = ("--model", tiny_folder("delta_net"), "--model", other)
    assert "there is no model 'nonsense'" in refused(path)
    path.write_text(path.read_text().replace('["nonsense"]', "[]"))
    assert f"{path} names no models; name them in its list, or give --model" in refused(path)
    assert f"there is no recipe '{tmp_path / 'missing.toml'}'" in refused(tmp_path / "missing.toml")
    assert "there is no recipe 'nosuch', neither a file nor one that ships; those that ship are" in refused("nosuch")
    same = ("--calibration", tmp_path / "text.txt", "--heldout", tmp_path / "text.txt")
    assert "calibration and held-out text are the same" in refused(path, *models, *same)
    assert "there is no text file or folder" in refused(path, *models, "--heldout", tmp_path / "missing")
    assert "cannot write to" in refused(path, *models, "--output", tmp_path / "text.txt")
    assert "--launcher is 'slurm'; take one of processes, ray" in refused(path, *models, "--engine", "slurm")
    assert "--seed is 1, 1; give at least one seed" in refused(path, *models, "--seed", 1, "--seed", 1)
    assert "--jobs" in refused(path, *models, "--jobs", 0)
    assert "holds other things than a sweep" in refused(path, *models, "--output", tmp_path)  # also the current folder
    edit_config(other, qk_norm="sum")
    assert "qk_norm 'sum'" in refused(recipe(methods=["pca"]), *models)

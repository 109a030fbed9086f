"""benchmarks/scale_study.py from text to table, with a tiny model on a CPU."""

import contextlib
import importlib
import io
import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from tiny_models import COMMON

from keyreduce.processes import Outcome

ROOT = Path(__file__).parents[2]
RECALL = {"recall": {"mqar": 0.25}}
# Lines of some words, so that there is something to learn and to calibrate with in each split.
TEXT = "".join(f"the value of line {number} is {number * number}\n" for number in range(200))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function: run the study, in this process, and return what is in the file of the model."""
    module = imported(monkeypatch)
    for number in range(60):
        (tmp_path / f"text/{number}").mkdir(parents=True)
        (tmp_path / f"text/{number}/file.txt").write_text(f"file {number}\n{TEXT}")
    config = {**COMMON, "model_type": "delta_net", "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    # A training of three seconds, and as much time for all else as it takes.
    words = ["--output", tmp_path / "out", "--work", tmp_path / "work", "--models", tmp_path / "tiny.json"]
    words += ["--installed", tmp_path / "text", "--minutes", 100, "--train-share", 3 / 6000, "--ratios", 0.5]
    words += ["--num-batches", 1, "--heldout-rows", 2, "--row-length", 32, "--rows", 4, "--tokens", 64]
    words += ["--kind", "full-distilled:batch_size=2,seq_len=32", "--repairs", "exact", "none", "reconstruct:steps=1"]
    words += ["--state-dtypes", "int4"]
    monkeypatch.setattr(module, "run_jobs", in_this_process(monkeypatch))
    monkeypatch.setattr(module, "Workers", InThisProcess)
    # Recall takes most of the time, and test_recovery_study.py measures it.
    recovery = importlib.import_module("recovery_study")
    measure = recovery.measure
    monkeypatch.setattr(recovery, "measure", lambda chosen, model: measure(without_recall(chosen), model) | RECALL)

    def run(*more: object) -> dict:
        module.main([str(word) for word in (*words, *more)])
        return json.loads((tmp_path / "out/tiny.json").read_text())

    return run


def imported(monkeypatch):
    for folder in ("benchmarks", "flame"):
        monkeypatch.syspath_prepend(ROOT / folder)
    return importlib.import_module("scale_study")


def words_of(tmp_path: Path, *models: str) -> list[str]:
    words = ["--output", tmp_path / "out", "--work", tmp_path / "work"]
    return [*map(str, words), *(["--models", *(str(tmp_path / name) for name in models)] if models else [])]


def without_recall(chosen: Namespace) -> Namespace:
    assert chosen.recall
    return Namespace(**{**vars(chosen), "recall": False})


def in_this_process(monkeypatch):
    """Return what stands in for `run_jobs`: another process would import for seconds. The first training pauses."""
    pauses = [["--pause-after", "0.0001"]]

    def run_jobs(jobs, **where):
        (job,) = jobs
        pause = pauses.pop() if pauses and job.name != "text" else ()
        monkeypatch.setattr(sys, "argv", [*job.argv[1:], *pause])
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(job.argv[1], run_name="__main__")
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.write_text(f"{said.getvalue()}UserWarning: barrier()\n  return func(*args, **kwargs)\n")
        return [Outcome(job, 0, 1.0, "")]

    return run_jobs


class InThisProcess:
    """What stands in for `Workers`."""

    calls = 0

    def __init__(self, devices):
        assert devices == []
        self.running = []

    has_free = property(lambda self: not self.running)

    def start(self, name, function, *arguments):
        InThisProcess.calls += 1
        function(*arguments)
        self.running.append(name)

    def ended(self, seconds):
        from gpu_workers import Ended

        return [Ended(self.running.pop(), 2.0, None)]

    def close(self):
        pass


def test_study(study, tmp_path, capsys):
    paused = study()
    assert "training" not in paused and not paused["left_out"]
    folder = tmp_path / "work/tiny/training"
    assert f"tiny: {folder}: paused at step" in capsys.readouterr().out

    found = study()
    training = found["training"]
    assert training["steps"] * 4 * 32 == training["tokens_seen"]
    assert 2.5 < training["seconds"] < 60
    in_int4 = [run for run in found["runs"] if run.get("state_dtype") == "int4"]
    found_in_float32 = [run for run in found["runs"] if run not in in_int4]
    kinds = [(run["repair"], run["kind"], run["tokens"]) for run in found_in_float32]
    repaired = "reconstruct:steps=1"
    trained = (repaired, "full-distilled:batch_size=2,seq_len=32", 64)
    assert kinds == [("exact", None, 0), ("none", None, 0), (repaired, None, 0), trained]
    assert all(run["ratio"] == "state=0.5" and run["perplexity"] > 1 for run in found_in_float32)
    heads, keys, values = found_in_float32[0]["sizes"]
    assert 0.4 < heads * keys * values / (2 * 16 * 16) <= 0.5
    assert all(one["recall"] == RECALL["recall"] for one in (found["dense"], *found_in_float32))
    assert [(run["ratio"], run["repair"]) for run in in_int4] == [("state=0", "none"), ("state=0.5", repaired)]
    dense_in_int4, cut_in_int4 = (run["perplexity"] for run in in_int4)
    assert dense_in_int4 != found["dense"]["perplexity"]
    assert cut_in_int4 != found_in_float32[2]["perplexity"]
    assert not found["left_out"]
    rise = 100 * (found_in_float32[1]["perplexity"] / found["dense"]["perplexity"] - 1)
    printed = capsys.readouterr().out
    assert f"tiny: {folder}/model: {training['heldout_bits_per_byte']:.3f} bits per byte" in printed
    assert f"| -50% | float32 | no repair |  | {rise:+.2f}% |" in printed

    # Again, nothing is left to do; what was lost is made again, unless there is no time for it.
    calls = InThisProcess.calls
    (lost,) = tmp_path.glob("work/tiny/runs/*none*/start.json")
    lost.unlink()
    assert study() == found
    assert InThisProcess.calls == calls + 1
    lost.unlink()
    later = study("--minutes", 0.001)
    assert list(later["left_out"]) == ["state=0.5 none"]
    assert InThisProcess.calls == calls + 1


def test_a_small_model_is_trained_as_a_step(study, tmp_path, monkeypatch, capsys):
    module = imported(monkeypatch)
    monkeypatch.setitem(module.MODELS, "tiny", module.Recipe(alone=True))
    few = ("--repairs", "none", "--ratios", 0.5, 0.75, "--state-dtypes", "--tokens")
    paused = study(*few)
    assert "training" not in paused
    assert "tiny: its training resumes in the next call" in capsys.readouterr().out
    found = study(*few)
    assert not found["left_out"]
    assert [(run["ratio"], run["repair"]) for run in found["runs"]] == [("state=0.5", "none"), ("state=0.75", "none")]
    steps = module.Study(module.parse_arguments(words_of(tmp_path, "tiny.json"))).steps("tiny")
    places = {step.name: step.stage for step in steps}
    # What it needs comes first, and all of the first share before the second.
    assert places["training"] == places["dense"] < places["state=0.5 none"] < places["state=0.5 reconstruct 4000000"]
    assert places["state=0.5 reconstruct 4000000"] < places["state=0.75 none"]


def test_more_tokens_are_expected_to_take_longer(tmp_path, monkeypatch):
    module = imported(monkeypatch)
    study = module.Study(module.parse_arguments([*words_of(tmp_path), "--models", "delta-net-20m"]))
    monkeypatch.setattr(study, "parameters", lambda model: 20)
    steps = {step.amount: step for step in study.steps("delta-net-20m") if step.kind == "distilled"}
    assert steps.keys() == {250_000, 1_000_000, 4_000_000, 16_000_000}
    assert {study.expected(step) for step in steps.values()} == {0}
    study.learn(steps[4_000_000], 100.0)
    assert [study.expected(steps[amount]) for amount in sorted(steps)] == [100, 100, 100, 400]
    # What is asked for after the first two comes after all else.
    assert steps[4_000_000].stage < steps[16_000_000].stage > study.steps("delta-net-20m")[-1].stage


def test_kernels_are_compiled_side_by_side(tmp_path, monkeypatch):
    module = imported(monkeypatch)
    monkeypatch.setattr(module, "gpus", lambda: ["0", "1"])
    jobs = []
    monkeypatch.setattr(module, "run_jobs", lambda some, **settings: jobs.extend(some) or [])
    module.Study(module.parse_arguments([*words_of(tmp_path), "--models", *module.MODELS])).prepare()
    assert [job.name for job in jobs] == ["text", *(f"kernels-{model}" for model in module.MODELS)]
    for option in ("--data", "--output"):  # two that write the same folder would refuse each other
        places = [job.argv[job.argv.index(option) + 1] for job in jobs]
        assert len(set(places)) == len(places)


def test_no_more_trainings_at_a_time_than_gpus(tmp_path, monkeypatch):
    module = imported(monkeypatch)
    monkeypatch.setattr(module, "gpus", lambda: ["0", "1"])
    small = ["delta-net-20m", "delta-net-60m", "gated-deltanet-20m"]
    study = module.Study(module.parse_arguments([*words_of(tmp_path), "--models", *small]))
    waiting = [step for model in small for step in study.steps(model)]
    running: list[str] = []
    while step := study.next_of(waiting, running):
        waiting.remove(step)
        running.append(f"{step.model}/{step.name}")
    assert running == ["delta-net-20m/training", "delta-net-60m/training"]
    (command,) = [step.call.args[0] for step in waiting if step.name == "training"]
    assert "torch.distributed.run" not in command
    assert command[command.index("--batch-size") + 1] == "64" and command[command.index("--micro-batch") + 1] == "16"
    # A GPU of two, for minutes that count for both.
    assert study.minutes_of("delta-net-60m") == pytest.approx(25 * 0.44 * 2 * 4 / (3 + 4 + 3), abs=1e-3)


@pytest.mark.parametrize(
    ("is_wrong", "model", "rows"),
    [
        (False, "gated-deltanet-220m", 16),
        (True, "gated-deltanet-220m", 4),
        (False, "qwen3-next-100m", 16),
        (True, "qwen3-next-100m", 8),
        (True, "delta-net-220m", 16),
    ],
)
def test_rows_at_a_time(is_wrong, model, rows, tmp_path, monkeypatch):
    """Fewer for models with the gated rule, on a GPU on which fla's kernels of it are wrong."""
    module = imported(monkeypatch)
    monkeypatch.setattr(module, "gpus", lambda: ["0", "1"])
    monkeypatch.setattr("keyreduce.models.miscompiled._is_affected", lambda device: is_wrong and device.type == "cuda")
    study = module.Study(module.parse_arguments([*words_of(tmp_path), "--models", model]))
    command = study.training_command(model, 1.0)
    assert command[command.index("--micro-batch") + 1] == str(rows)
    assert command[command.index("--batch-size") + 1] == "64"


def test_the_tables_tell_of_failures_and_not_of_each_step_without_time(monkeypatch):
    tables = importlib.import_module(imported(monkeypatch).print_tables.__module__)
    late = {"state=0.5 none": "it takes 43 s, and 0 s are left", "dense": "what it begins with was not made"}
    one = {"model": "tiny", "config": {"model_type": "delta_net"}, "left_out": late}
    assert [line for line in tables.scale_tables([one]) if line.startswith("Cells")] == [
        "Cells are empty where there was not time for a step."
    ]
    lines = list(tables.scale_tables([one | {"left_out": {"dense": "OutOfMemoryError: 80 GB"}}]))
    assert lines[-1] == "tiny, dense, was left out: OutOfMemoryError: 80 GB."

"""The launchers of a sweep: processes of this machine, and Ray."""

import importlib.util
import sys
from functools import partial

import pytest

from keyreduce.api import tasks
from keyreduce.errors import KeyreduceError
from keyreduce.processes import Job, run_jobs
from keyreduce.sweep.launchers import launcher_named


def jobs_of(folder, *codes: str) -> list[Job]:
    return [
        Job(f"job {number}", [sys.executable, "-c", code], folder / f"{number}.txt", {"MINE": f"number {number}"})
        for number, code in enumerate(codes)
    ]


CODES = (
    "import os; print(os.environ['MINE'])",
    "raise SystemExit('it was too hot')",
    "import os; print(os.environ['MINE'])",
)


def test_processes_are_one_alone_or_as_many_as_one_says(tmp_path):
    launch, workers = launcher_named("processes", jobs=None, device="cpu")
    assert workers == 1
    assert [outcome.code for outcome in launch(jobs_of(tmp_path, *CODES))] == [0, 1, 0]
    assert (tmp_path / "2.txt").read_text() == "number 2\n"
    assert launcher_named("processes", jobs=3, device="cpu")[1] == 3


def test_processes_are_one_a_gpu(monkeypatch):
    monkeypatch.setattr(tasks, "gpus", lambda: ["4", "6"])
    launch, workers = launcher_named("processes", jobs=None, device="cuda")
    assert isinstance(launch, partial) and launch.func is run_jobs
    assert (workers, launch.keywords) == (2, {"workers": 2, "devices": ["4", "6"]})
    # One GPU that was named is the only one.
    launch, workers = launcher_named("processes", jobs=None, device="cuda:1")
    assert (workers, launch.keywords["devices"]) == (1, [])


def test_ray_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KeyreduceError, match=r"`launcher` ray needs Ray: pip install keyreduce\[ray\]"):
        launcher_named("ray", jobs=None, device="cpu")


def test_a_local_ray_does_what_processes_do(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="needs Ray, an extra")
    monkeypatch.setenv("RAY_ADDRESS", "local")
    try:
        launch, workers = launcher_named("ray", jobs=2, device="cpu")
        outcomes = launch(jobs_of(tmp_path, *CODES))
    finally:
        ray.shutdown()
    assert workers == 2
    assert [outcome.code for outcome in outcomes] == [0, 1, 0]
    assert [outcome.job.name for outcome in outcomes] == ["job 0", "job 1", "job 2"]
    assert outcomes[1].message == "it was too hot"
    assert [(tmp_path / f"{number}.txt").read_text() for number in (0, 2)] == ["number 0\n", "number 2\n"]

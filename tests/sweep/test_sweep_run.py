"""Doing the runs of a sweep: what is done stays done, what fails is told, and the others go on."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from keyreduce.api.calibrate import CalibrateRequest
from keyreduce.api.tasks import failure_of, is_done
from keyreduce.errors import KeyreduceError
from keyreduce.processes import Job, Outcome
from keyreduce.sweep.results import CALIBRATION, DENSE, PRUNED, read_results
from keyreduce.sweep.run import Run, run_sweep

HOLD = """
import pathlib, sys, time
from keyreduce.outputs import claimed
with claimed(pathlib.Path(sys.argv[1]), folder=False):
    print("held", flush=True)
    time.sleep(60)
"""
STEPS = {"calibrate": CalibrateRequest()}  # what a run is to do does not matter here: nothing is carried out


def runs_of(pruned: int) -> list[Run]:
    """A dense model, a calibration, and runs that need it."""
    first = [
        Run(DENSE, "dense", "dense/a", {"number": -2}, STEPS, {"model": "a"}),
        Run(CALIBRATION, "calibration", "calibration/a", {"number": -1}, STEPS, {"model": "a"}),
    ]
    others = [
        Run(PRUNED, f"run {number}", f"runs/{number}", {"number": number}, STEPS, {"model": "a"}, ("calibration/a",))
        for number in range(pruned)
    ]
    return [*first, *others]


class Launcher:
    """Does runs as the worker would, but for those that are to fail, or at which its process is to die."""

    def __init__(self, *, fails: Sequence[str] = (), dies: Sequence[str] = ()):
        self.fails, self.dies = set(fails), set(dies)
        self.jobs: list[list[str]] = []
        self.done: list[str] = []

    def __call__(self, jobs: Sequence[Job]) -> list[Outcome]:
        return [self._do(job) for job in jobs]

    def _do(self, job: Job) -> Outcome:
        folders = [Path(argument) for argument in job.argv[3:]]
        self.jobs.append([folder.name for folder in folders])
        for folder in folders:
            name = f"{folder.parent.name}/{folder.name}"
            task = json.loads((folder / "task.json").read_text())
            if name in self.dies:
                return Outcome(job, -9, 1.0, "it was ended by SIGKILL")
            if name in self.fails:
                (folder / "failure.json").write_text(json.dumps({"message": f"{name} went wrong"}))
                continue
            self.done.append(name)
            (folder / "result.json").write_text(json.dumps({**task["result"], "steps": {}}))
        return Outcome(job, 0, 1.0, "")


@pytest.fixture
def sweep(tmp_path) -> Callable:
    """A function: do runs in the folder ``sweep``; returns what failed and how far progress went."""

    def run(runs: Sequence[Run], launch: Launcher, **options):
        counts: list[int] = []
        failures = run_sweep(
            runs,
            tmp_path / "sweep",
            about={"recipe": "r"},
            launch=launch,
            progress=counts.append,
            **{"workers": 1} | options,
        )
        return failures, sum(counts)

    return run


def test_all_runs_are_done_those_first_that_others_need(sweep, tmp_path):
    runs, launch = runs_of(10), Launcher()
    assert sweep(runs[::-1], launch) == ({}, 12)
    assert set(launch.done[:2]) == {"dense/a", "calibration/a"}
    assert sorted(launch.done) == sorted(run.folder for run in runs)
    # A process does several runs, but not too many.
    assert [len(names) for names in launch.jobs] == [2, 8, 2]
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert record["recipe"] == "r"
    assert [run["folder"] for run in record["runs"]] == [run.folder for run in runs[::-1]]


def test_several_workers_share_the_runs(sweep):
    launch = Launcher()
    sweep(runs_of(10), launch, workers=4)
    assert [len(names) for names in launch.jobs] == [1, 1, 3, 3, 3, 1]


def test_what_is_done_is_not_done_again(sweep):
    sweep(runs_of(3), Launcher())
    launch = Launcher()
    assert sweep(runs_of(5), launch) == ({}, 7)
    assert launch.done == ["runs/3", "runs/4"]
    launch = Launcher()
    assert sweep(runs_of(5), launch) == ({}, 7)
    assert launch.jobs == []
    launch = Launcher()
    sweep(runs_of(5), launch, again=True)
    assert len(launch.done) == 7


def test_a_run_that_fails_leaves_the_others_alone_and_is_tried_again(sweep, tmp_path):
    failures, count = sweep(runs_of(4), Launcher(fails=["runs/1"]))
    assert failures == {"runs/1": "runs/1 went wrong"}
    assert count == 6
    launch = Launcher()
    assert sweep(runs_of(4), launch) == ({}, 6)
    assert launch.done == ["runs/1"]
    assert failure_of(tmp_path / "sweep" / "runs" / "1") is None


def test_a_process_that_dies_takes_one_run_with_it(sweep, tmp_path):
    launch = Launcher(dies=["runs/1", "runs/3"])
    failures, count = sweep(runs_of(6), launch)
    assert failures == dict.fromkeys(["runs/1", "runs/3"], "it was ended by SIGKILL")
    assert count == 8
    assert [number for number in range(6) if not is_done(tmp_path / "sweep" / "runs" / str(number))] == [1, 3]
    assert failure_of(tmp_path / "sweep" / "runs" / "3") == "it was ended by SIGKILL"


def test_without_its_calibration_a_run_fails_too(sweep, tmp_path):
    launch = Launcher(fails=["calibration/a"])
    failures, count = sweep(runs_of(2), launch)
    assert failures["calibration/a"] == "calibration/a went wrong"
    assert failures["runs/0"] == failures["runs/1"] == "its calibration failed: calibration/a went wrong"
    assert count == 4
    assert launch.done == ["dense/a"]
    assert sweep(runs_of(2), Launcher()) == ({}, 4)


def test_an_interruption_keeps_what_is_done(sweep, tmp_path):
    class Interrupted(Launcher):
        def _do(self, job):
            super()._do(job)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(runs_of(2), Interrupted(dies=["calibration/a"]))
    assert is_done(tmp_path / "sweep" / "dense" / "a")
    launch = Launcher()
    assert sweep(runs_of(2), launch) == ({}, 4)
    assert "dense/a" not in launch.done


def test_two_sweeps_in_one_folder(tmp_path):
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "sweep" / "sweep.json")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert held.stdout.readline() == "held\n"
        with pytest.raises(KeyreduceError, match=r"another run is writing .*sweep\.json right now"):
            run_sweep(runs_of(1), tmp_path / "sweep", about={}, launch=Launcher(), workers=1)
    finally:
        held.kill()
        held.wait()
    assert run_sweep(runs_of(1), tmp_path / "sweep", about={}, launch=Launcher(), workers=1) == {}


def test_a_folder_that_holds_something_else(sweep, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "thesis.txt").write_text("precious")
    with pytest.raises(KeyreduceError, match="holds other things than a sweep"):
        sweep(runs_of(1), Launcher())
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["thesis.txt"]


def test_folders_that_are_no_sweep(tmp_path):
    with pytest.raises(KeyreduceError, match=r"holds no sweep\.json; give the folder that keyreduce sweep has written"):
        read_results(tmp_path)
    for content in ("{}", '{"runs": [1]}', '{"runs": [{}]}'):
        (tmp_path / "sweep.json").write_text(content)
        with pytest.raises(KeyreduceError, match="is damaged: it lists no runs"):
            read_results(tmp_path)

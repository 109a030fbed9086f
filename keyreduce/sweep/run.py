"""A sweep run: what cannot be is refused first, then each run is done in a process, and what is done stays done."""

import contextlib
import fcntl
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from keyreduce import __version__
from keyreduce.checkpoint.find import model_name, open_model
from keyreduce.data.text import TextSource
from keyreduce.errors import KeyreduceError
from keyreduce.jobs import Job, Outcome
from keyreduce.outputs import write_json
from keyreduce.pruning.methods import method_named
from keyreduce.pruning.planning import check_method
from keyreduce.recovery.overlap import refuse_overlap
from keyreduce.sweep.recipe import Recipe
from keyreduce.sweep.record import FAILURE_NAME, RESULT_NAME, SWEEP_NAME, TASK_NAME, failure_of, is_done
from keyreduce.sweep.runs import PRUNED, Model, Place, Run, Texts, plan_runs

Engine = Callable[[Sequence[Job]], list[Outcome]]
"""Runs jobs and returns how each ended."""

_SHARE = 8  # runs that a process does: enough to make its start cheap, few enough to lose little when it dies
_WORKER = "keyreduce.cli.sweep_worker"
_LOCK_NAME = ".sweep.lock"
_POLL_SECONDS = 0.5


class Failure(NamedTuple):
    """A run that has no result, and why."""

    run: Run
    message: str


def plan_sweep(
    recipe: Recipe,
    root: Path,
    *,
    calibration: TextSource,
    heldout: TextSource,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Run]:
    """Return the runs of a sweep, after refusing what cannot be for all models.

    Args:
        recipe: what to compare.
        root: the folder that gets it all.
        calibration, heldout: the texts.
        device, dtype: where and in what models run.

    Raises:
        KeyreduceError: no model is named, two have one name, one is none or cannot be pruned in one of the ways, or
            the texts overlap.
    """
    if not recipe.models:
        raise KeyreduceError("the recipe names no models; give them with `model`")
    refuse_overlap(calibration, heldout)
    models = []
    for name in recipe.models:
        source = open_model(name)
        for cell in recipe.cells:
            method, budget = method_named(cell.method), cell.budget
            check_method(source, method, budget.targets)
            budget.check(source.config, method)
        models.append(Model(_short(name, recipe.models), model_name(name), source.identity))
    texts = (
        Texts(tuple(map(os.path.realpath, text.describe().get("paths", ()))), text.identity)
        for text in (calibration, heldout)
    )
    place = Place(str(device), str(dtype).removeprefix("torch."))
    return plan_runs(recipe, models, *texts, place, Path(os.path.realpath(root)))


def run_sweep(
    runs: Sequence[Run],
    root: Path,
    *,
    about: dict,
    engine: Engine,
    workers: int,
    keep_checkpoints: bool = False,
    again: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Failure]:
    """Do the runs that have no result yet, those first that others need.

    Args:
        runs: as :func:`plan_sweep` returns them.
        root: the folder of the sweep; ``sweep.json`` in there is written before the first run.
        about: what ``sweep.json`` says of recipe and texts.
        engine: what runs the processes.
        workers: how many of them it runs at a time.
        keep_checkpoints: leave pruned checkpoints in the folders of the runs.
        again: do also those that are done.
        progress: called with numbers of runs that have ended, or were done already.

    Returns:
        The runs that have no result.

    Raises:
        KeyreduceError: ``root`` holds something else, another process is sweeping there, or it cannot be written.
    """
    root = Path(os.path.realpath(root))
    if root.is_dir() and any(root.iterdir()) and not (root / SWEEP_NAME).is_file():
        raise KeyreduceError(f"{root} holds other things than a sweep; give another `output`")
    failures: dict[str, str] = {}
    with _locked(root):
        write_json(
            root / SWEEP_NAME,
            {**about, "versions": _versions(), "runs": [run.to_json() for run in runs]},
            overwrite=True,
        )
        for stage in ([run for run in runs if run.kind != PRUNED], [run for run in runs if run.kind == PRUNED]):
            todo = []
            for run in stage:
                reasons = [failures[needed] for needed in run.needs if needed in failures]
                if is_done(root / run.folder) and not again:
                    continue
                if reasons:
                    failures[run.folder] = f"its calibration failed: {reasons[0]}"
                    _prepare(root, run, keep_checkpoints)
                    write_json(root / run.folder / FAILURE_NAME, {"message": failures[run.folder]}, overwrite=True)
                else:
                    todo.append(run)
            _advance(progress, len(stage) - len(todo))
            for run in todo:
                _prepare(root, run, keep_checkpoints)
            failures |= _do(todo, root, engine, workers, progress)
    return [Failure(run, failures[run.folder]) for run in runs if run.folder in failures]


def _do(runs: Sequence[Run], root: Path, engine: Engine, workers: int, progress) -> dict[str, str]:
    """Do runs, several a process; where a process dies, the run that it was at has failed, and the others go on."""
    waiting, failures, number = list(runs), {}, 0
    while waiting:
        size = min(_SHARE, -(-len(waiting) // workers))
        shares = [waiting[start : start + size] for start in range(0, len(waiting), size)]
        jobs = [_job(root, share, number + index) for index, share in enumerate(shares)]
        number += len(jobs)
        with _watched(root, waiting, progress):
            outcomes = engine(jobs)
        waiting = []
        for share, outcome in zip(shares, outcomes, strict=True):
            left = []
            for run in share:
                message = failure_of(root / run.folder)
                if message is not None:
                    failures[run.folder] = message
                elif not is_done(root / run.folder):
                    left.append(run)
            if left:
                died = outcome.message or "its process ended before it was done"
                write_json(root / left[0].folder / FAILURE_NAME, {"message": died}, overwrite=True)
                failures[left[0].folder] = died
                _advance(progress, 1)
            waiting += left[1:]
    return failures


def _job(root: Path, share: Sequence[Run], number: int) -> Job:
    folders = [str(root / run.folder) for run in share]
    # Modules are found where this process found them, and not in the current folder.
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"}
    name = share[0].title if len(share) == 1 else f"{share[0].title}, and {len(share) - 1} more"
    return Job(name, [sys.executable, "-m", _WORKER, *folders], root / "logs" / f"{number:03}.txt", environment)


def _prepare(root: Path, run: Run, keep_checkpoints: bool) -> None:
    folder = root / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in (RESULT_NAME, FAILURE_NAME):
        (folder / name).unlink(missing_ok=True)
    task = {"title": run.title, "settings": run.settings, "steps": run.steps, "keep_checkpoints": keep_checkpoints}
    write_json(folder / TASK_NAME, task, overwrite=True)


@contextlib.contextmanager
def _watched(root: Path, runs: Sequence[Run], progress: Callable[[int], None] | None) -> Iterator[None]:
    """Tell of runs as they end, while the block runs: a process says nothing before its last one has."""
    folders, over = [root / run.folder for run in runs], threading.Event()

    def count() -> None:
        waiting = folders
        while waiting:
            last = over.is_set()
            left = [folder for folder in waiting if not is_done(folder) and not (folder / FAILURE_NAME).is_file()]
            _advance(progress, len(waiting) - len(left))
            waiting = left
            if last:
                return
            over.wait(_POLL_SECONDS)

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _advance(progress: Callable[[int], None] | None, amount: int) -> None:
    if progress is not None and amount:
        progress(amount)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder, which is made; the lock ends with the process."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / _LOCK_NAME, "w")
    except OSError as error:
        raise KeyreduceError(f"cannot write to {root}: {error.strerror}; give another `output`") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KeyreduceError(f"another sweep is at work in {root}; wait for it, or give another `output`") from None
        yield


def _short(name: str, names: Sequence[str]) -> str:
    """Return what tables call a model: the last part of its path, where that tells it from the others."""
    last = Path(name).name or name
    return last if [Path(other).name for other in names].count(last) == 1 else name


def _versions() -> dict:
    return {"keyreduce": __version__, "python": platform.python_version(), "torch": torch.__version__}

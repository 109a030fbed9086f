"""Requests that other processes carry out. Each task is a folder, in which the process leaves what came of it.

FOLDER/
    task.json       the requests, step by step
    log.txt         what was reported meanwhile
    result.json     the result of each step; it is written last, so a task with this file is done
    failure.json    why a task that failed has no result.json
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from keyreduce.api.request import Request
from keyreduce.outputs import read_json, write_json
from keyreduce.processes import Job, Outcome, gpus, run_jobs

TASK_NAME = "task.json"
LOG_NAME = "log.txt"
RESULT_NAME = "result.json"
FAILURE_NAME = "failure.json"

Launch = Callable[[Sequence[Job]], list[Outcome]]
"""Runs commands in processes of their own, and returns how each ended, in their order."""

_POLL_SECONDS = 0.5


def write_task(folder: Path, steps: Mapping[str, Request], **more: object) -> None:
    """Write what is to be done into ``folder``, which is made, and remove what an earlier process left there.

    Args:
        folder: the task's folder.
        steps: name of a step -> its request; they are carried out in this order.
        more: ``result``, an object whose entries go into ``result.json`` as well; ``keep``, file -> the name under
            which it is copied when all steps are done; ``remove``, folders that are removed then. Paths are relative.
    """
    for name in (RESULT_NAME, FAILURE_NAME):
        (folder / name).unlink(missing_ok=True)
    tasks = {}
    for name, request in steps.items():
        tasks[name] = {"verb": type(request).__module__.rpartition(".")[2], "request": request.to_json()}
    write_json(folder / TASK_NAME, {**more, "steps": tasks}, overwrite=True)


def is_done(folder: Path) -> bool:
    """Return whether a task has its result."""
    return (folder / RESULT_NAME).is_file()


def failure_of(folder: Path) -> str | None:
    """Return why a task failed, or None if it did not."""
    path = folder / FAILURE_NAME
    return str(read_json(path).get("message", "")) if path.is_file() else None


def write_failure(folder: Path, message: str) -> None:
    """Write down why a task has no result."""
    write_json(folder / FAILURE_NAME, {"message": " ".join(message.split())}, overwrite=True)


def on_this_machine(device: str, jobs: int | None) -> tuple[Launch, int]:
    """Return what runs processes on this machine, and how many it runs at a time.

    Args:
        device: what the requests compute on. With ``cuda``, each process gets a GPU of its own.
        jobs: how many processes at a time; None means one for each GPU, or one alone where they do not get GPUs.
    """
    devices = gpus() if device == "cuda" else []
    workers = jobs or len(devices) or 1
    return partial(run_jobs, workers=workers, devices=devices), workers


def do_tasks(
    folders: list[Path], logs: Path, launch: Launch, workers: int, *, together: int = 1, progress: Callable[[int], None]
) -> dict[Path, str]:
    """Carry out tasks in processes; where a process dies, the task that it was at has failed, and the others go on.

    Args:
        folders: the tasks, as :func:`write_task` leaves them.
        logs: a folder for what the processes print beside what goes into the logs of the tasks.
        launch, workers: what runs the processes, and how many at a time.
        together: the most tasks that one process carries out.
        progress: called with numbers of tasks that have ended.

    Returns:
        Folder -> why its task failed, of those that did.
    """
    waiting, failures, number = list(folders), {}, 0
    while waiting:
        size = min(together, -(-len(waiting) // workers))
        shares = [waiting[start : start + size] for start in range(0, len(waiting), size)]
        jobs = [_job(share, logs / f"{number + index:03}.txt") for index, share in enumerate(shares)]
        number += len(jobs)
        with _counted(waiting, progress):
            outcomes = launch(jobs)
        waiting = []
        for share, outcome in zip(shares, outcomes, strict=True):
            failures |= {folder: message for folder in share if (message := failure_of(folder)) is not None}
            left = [folder for folder in share if folder not in failures and not is_done(folder)]
            if left:
                failures[left[0]] = outcome.message or "its process ended before it was done"
                write_failure(left[0], failures[left[0]])
                progress(1)
            waiting += left[1:]
    return failures


def _job(share: Sequence[Path], log: Path) -> Job:
    # Modules are found where this process found them, and not in the current folder.
    environment = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "keyreduce.api.worker", *map(str, share)]
    return Job(share[0].name, command, log, environment)


@contextlib.contextmanager
def _counted(folders: Sequence[Path], progress: Callable[[int], None]) -> Iterator[None]:
    """Report tasks as they end while the block runs: a process says nothing before its last task has ended."""
    over = threading.Event()

    def count() -> None:
        waiting, last = list(folders), False
        while waiting and not last:
            last = over.wait(_POLL_SECONDS)
            left = [folder for folder in waiting if not is_done(folder) and not (folder / FAILURE_NAME).is_file()]
            if len(left) < len(waiting):
                progress(len(waiting) - len(left))
            waiting = left

    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()

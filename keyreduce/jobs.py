"""Child processes, several at a time: each with a log of its own and, where there are GPUs, a GPU of its own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from keyreduce.errors import KeyreduceError

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
_TAIL_BYTES = 8192


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        name: what messages call it.
        argv: the command and its arguments; :func:`keyreduce_command` makes those of keyreduce itself.
        log: the file that gets its stdout and stderr; it is written anew, and its folder is made.
        env: environment variables of its own, over those that it inherits and those that :func:`run_jobs` sets.
    """

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: the job.
        code: its exit code; negative is the signal that ended it, as in ``subprocess``.
        seconds: how long it ran.
        message: of a job that failed, why: the last line of its log. Empty for one that did not.
    """

    job: Job
    code: int
    seconds: float
    message: str

    @property
    def ok(self) -> bool:
        """Whether the job did what it was to do."""
        return self.code == 0


@dataclass
class _Running:
    job: Job
    slot: int
    process: subprocess.Popen
    started: float


def keyreduce_command(*arguments: object) -> list[str]:
    """Return what runs ``keyreduce`` with these arguments in a process of the same Python."""
    return [sys.executable, "-m", "keyreduce", *map(str, arguments)]


def gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty where there is none."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(count)] if named is None else named.split(",")[:count]


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int | None = None,
    devices: Sequence[str] = (),
    progress: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Run all jobs, so many at a time, and return how each ended; one that fails does not stop the others.

    They start in their order. The cores of this machine are shared out among them by OMP_NUM_THREADS, unless the
    environment sets that already. Where this call ends by an exception or a signal (SIGINT, SIGTERM, SIGHUP, in the
    main thread), the jobs that run are ended first, with the processes that they have started.

    Args:
        jobs: what to run.
        workers: how many at a time; None is one a device, or one alone where there are no devices.
        devices: what CUDA_VISIBLE_DEVICES may be, one device each; :func:`gpus` lists them. Where there are more
            workers than devices, workers share them. Empty leaves the variable alone.
        progress: called as each job ends.

    Returns:
        The outcomes, in the order of the jobs.

    Raises:
        KeyreduceError: a log cannot be written.
        KeyboardInterrupt: SIGINT has come.
        SystemExit: SIGTERM or SIGHUP has come.
    """
    workers = max(1, min(workers or len(devices) or 1, len(jobs)))
    waiting, running, outcomes = list(jobs), [], {}
    free = list(range(workers))
    with _signals() as received:
        try:
            while waiting or running:
                while waiting and free and not received:
                    job, slot = waiting.pop(0), free.pop(0)
                    started = _start(job, slot, workers, devices)
                    if isinstance(started, Outcome):
                        free.append(slot)
                        outcomes[id(job)] = started
                        _tell(progress, started)
                    else:
                        running.append(started)
                if received:
                    break
                for entry in [entry for entry in running if entry.process.poll() is not None]:
                    running.remove(entry)
                    free.append(entry.slot)
                    outcome = _ended(entry)
                    outcomes[id(entry.job)] = outcome
                    _tell(progress, outcome)
                if running:
                    time.sleep(_POLL_SECONDS)
        finally:
            _end(running)
    if received:
        raise KeyboardInterrupt if received[0] == signal.SIGINT else SystemExit(128 + received[0])
    return [outcomes[id(job)] for job in jobs]


def _tell(progress: Callable[[Outcome], None] | None, outcome: Outcome) -> None:
    if progress is not None:
        progress(outcome)


def _start(job: Job, slot: int, workers: int, devices: Sequence[str]) -> _Running | Outcome:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // workers)))
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    environment |= job.env
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = open(job.log, "wb")
    except OSError as error:
        raise KeyreduceError(f"cannot write {job.log}: {error.strerror}") from None
    with log:
        try:
            # A session of its own: what a job starts in turn is ended with it, and a Ctrl-C comes to us alone.
            process = subprocess.Popen(
                list(job.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(job, 127, 0.0, f"{job.argv[0]} cannot be run: {error.strerror}")
    return _Running(job, slot, process, time.monotonic())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ended(entry: _Running) -> Outcome:
    code = entry.process.returncode
    seconds = time.monotonic() - entry.started
    if code == 0:
        return Outcome(entry.job, code, seconds, "")
    line = last_line(entry.job.log) or f"it ended with exit code {code} and said nothing"
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        memory = ", as happens where memory runs out" if name == "SIGKILL" else ""
        line = f"it was ended by {name}{memory}"
    return Outcome(entry.job, code, seconds, line)


def last_line(log: Path) -> str:
    """Return the last line of a log that is not blank; empty if there is none.

    Of a line that keyreduce ended with it is the message alone, without a progress bar that may stand before it.
    """
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = re.split(r"[\r\n]", file.read().decode(errors="replace"))
    except OSError:
        return ""
    told = [line.strip() for line in lines if line.strip()]
    return told[-1].partition("keyreduce: ")[2] or told[-1] if told else ""


def _end(running: Sequence[_Running]) -> None:
    """End processes: politely, so that they clear up what they have begun to write, and then by force."""
    for entry in running:
        _signal(entry.process, signal.SIGINT)
    deadline = time.monotonic() + _GRACE_SECONDS
    for entry in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            entry.process.wait(max(0.0, deadline - time.monotonic()))
        _signal(entry.process, signal.SIGKILL)
        entry.process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)  # the leader of its own session and group


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Note signals instead of being ended by them while the block runs; only a main thread can."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # What nohup and shells have told us to ignore, we ignore.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

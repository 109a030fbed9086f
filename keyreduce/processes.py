"""Processes: those of ``torchrun``, which share one measurement, and child processes, several at a time.

Each process of torchrun takes every n-th batch, on its own device. What is found per batch does not depend on who ran
it, and sums are taken over the same numbers, so that a figure is the same from any number of processes.
"""

import contextlib
import datetime
import json
import os
import queue
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen, TimeoutExpired
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from keyreduce.errors import KeyreduceError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_LONGEST = datetime.timedelta(days=7)  # for which the first to finish waits for the last
_groups = count()  # numbers the groups of processes that this one joins
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 5.0
_TAIL_BYTES = 8192


def command_line() -> str:
    """Return what started this process, for records: settings from the environment are not in it."""
    program, *arguments = sys.argv or [""]
    name = Path(program).name or "python"
    # `python -m keyreduce` runs a file of that name.
    return shlex.join(["keyreduce" if name == "__main__.py" else name, *arguments])


def is_torchrun() -> bool:
    """Return whether ``torchrun`` started this process. ``WORLD_SIZE`` alone does not say so: clusters set it too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Processes(NamedTuple):
    """Which process this is, of how many; and its number on this machine, which is that of its GPU."""

    rank: int = 0
    number: int = 1
    local_rank: int = 0

    @classmethod
    def of_torchrun(cls) -> "Processes":
        """Return what ``torchrun`` started, or one process alone where it did not."""
        if not is_torchrun():
            return cls()
        return cls(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))

    def device(self, device: str | None) -> str | None:
        """Return the device of this process where ``device`` leaves the choice: a GPU of its own."""
        import torch

        if self.number > 1 and device in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local_rank % torch.cuda.device_count()}"
        return device

    def own(self, items: Iterable[T]) -> Iterator[T]:
        """Yield this process's share: every n-th of ``items``."""
        return islice(items, self.rank, None, self.number)

    def gather(self, work: Callable[[], dict]) -> list[dict]:
        """Do this process's share, and return the JSON object that each process found, in the order of their ranks.

        Raises KeyreduceError if ``work`` raised it, here or in another process. Only the first process says so: the
        others end with exit code 2.
        """
        if self.number == 1:
            return [work()]
        import torch

        try:
            found = {"found": work()}
        except KeyreduceError as error:
            found = {"error": str(error)}
        # As JSON, so that no process reads a pickle of another. Spaces at its end change nothing.
        text = json.dumps(found).encode()
        with _gloo() as dist:
            longest = torch.tensor(len(text))
            dist.all_reduce(longest, dist.ReduceOp.MAX)
            own = torch.frombuffer(bytearray(text.ljust(int(longest))), dtype=torch.uint8)
            texts = [torch.empty_like(own) for _ in range(self.number)]
            dist.all_gather(texts, own)
        everyone = [json.loads(one.numpy().tobytes()) for one in texts]
        for one in everyone:
            if "error" in one:
                if self.rank:
                    raise SystemExit(2)
                raise KeyreduceError(one["error"])
        return [one["found"] for one in everyone]

    @contextlib.contextmanager
    def adding(self) -> Iterator[Callable[["torch.Tensor"], None]]:
        """While the block runs, give a function that puts into a tensor its sum over all processes.

        Every process calls it equally often, for tensors of the same shapes. It raises KeyreduceError where another
        process has ended before that.
        """
        if self.number == 1:
            yield lambda tensor: None
            return
        with _gloo() as dist:

            def add(tensor: "torch.Tensor") -> None:
                total = tensor.cpu()
                try:
                    dist.all_reduce(total)
                except RuntimeError as error:
                    raise KeyreduceError("another process of torchrun has ended early; its message says why") from error
                tensor.copy_(total)

            yield add


@contextlib.contextmanager
def _gloo() -> Iterator[Any]:
    """Join the processes of torchrun in a group while the block runs, and give ``torch.distributed``."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, number = next(rendezvous("env://", timeout=_LONGEST))
    # Each group under a name of its own: in a second one of the same name, a process may still find the addresses that
    # the others had in the first, and wait there for ever.
    store = PrefixStore(f"keyreduce-{next(_groups)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=number, timeout=_LONGEST)
    try:
        yield dist
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Job:
    """A command to run.

    ``log`` gets its stdout and stderr; the file is written anew, and its folder is made. ``env`` is set over what the
    command inherits and what :func:`run_jobs` sets.
    """

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        code: its exit code; negative is the signal that ended it, as in ``subprocess``.
        message: why it failed: the last line of its log. Empty if it did not fail.
    """

    job: Job
    code: int
    seconds: float
    message: str


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
    """Run all jobs and return how each ended, in their order; one that fails does not stop the others.

    They start in their order, too. The cores of this machine are shared out among them by OMP_NUM_THREADS, unless the
    environment sets that already. Where this call ends by an exception, such as a KeyboardInterrupt, the jobs that run
    are ended first, with the processes that they have started.

    Args:
        workers: how many at a time; None is one a device, or one alone where there are no devices.
        devices: what CUDA_VISIBLE_DEVICES may be, one device each; :func:`gpus` lists them. Where there are more
            workers than devices, workers share them. Empty leaves the variable alone.
        progress: called in this thread as each job ends.

    Raises KeyreduceError if a log cannot be written.
    """
    workers = max(1, min(workers or len(devices) or 1, len(jobs)))
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for worker in range(workers):
        free.put(devices[worker % len(devices)] if devices else None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    inherited = {"OMP_NUM_THREADS": str(max(1, cores // workers)), **os.environ, "PYTHONUNBUFFERED": "1"}
    is_over = threading.Event()

    def run(job: Job) -> Outcome:
        device = free.get()
        own = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        try:
            return _run(job, inherited | own | dict(job.env), is_over)
        finally:
            free.put(device)

    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(run, job) for job in jobs]
            for future in as_completed(futures):
                outcome = future.result()
                if progress is not None:
                    progress(outcome)
            return [future.result() for future in futures]
        finally:
            is_over.set()


def _run(job: Job, environment: Mapping[str, str], is_over: threading.Event) -> Outcome:
    """Run a job until it ends, or ``is_over`` is set: then it is asked to end, and after a while made to."""
    if is_over.is_set():
        raise CancelledError
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        log = open(job.log, "wb")  # noqa: SIM115  (closed below; its own errors are told here)
    except OSError as error:
        raise KeyreduceError(f"cannot write {job.log}: {error.strerror}") from None
    started = time.monotonic()
    with log:
        try:
            # A session of its own: what a job starts in turn is ended with it, and a Ctrl-C comes to us alone.
            process = Popen(job.argv, env=environment, stdin=DEVNULL, stdout=log, stderr=STDOUT, start_new_session=True)
        except OSError as error:
            return Outcome(job, 127, 0.0, f"{job.argv[0]} cannot be run: {error.strerror}")
    while process.poll() is None and not is_over.wait(_POLL_SECONDS):
        pass
    # Children ignore what we do, as processes that a script starts in the background ignore Ctrl-C.
    polite = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    for number, grace in ((polite, _GRACE_SECONDS), (signal.SIGKILL, None)) if is_over.is_set() else ():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutExpired):
            process.wait(grace)
    code, message = process.returncode, ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        message = f"it was ended by {name}{', as happens where memory runs out' if name == 'SIGKILL' else ''}"
    elif code:
        message = last_line(job.log) or f"it ended with exit code {code} and said nothing"
    return Outcome(job, code, time.monotonic() - started, message)


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

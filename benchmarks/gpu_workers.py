"""A process for each GPU, which carries out one call after another.

To import torch and fla and to compile kernels takes longer than most of the calls do.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

_CONTEXT = multiprocessing.get_context("spawn")
_GRACE = 10.0  # seconds, in which a process removes what it has half made


class Ended(NamedTuple):
    """How a call ended: its name, its seconds, and why it failed, or None."""

    name: str
    seconds: float
    failure: str | None


class Workers:
    """Processes that each have one of the GPUs, or one process without a GPU; to be closed.

    Args:
        devices: what CUDA_VISIBLE_DEVICES is to be in each; several may share one.
    """

    def __init__(self, devices: Sequence[str]):
        self.number = len(devices) or 1
        self._free: list[str | None] = list(devices) or [None]
        self._idle: list[_Worker] = []
        self._busy: dict[str, _Worker] = {}

    @property
    def has_free(self) -> bool:
        """Whether there is a process that does nothing."""
        return len(self._busy) < self.number

    @property
    def running(self) -> list[str]:
        """The names of the calls that run."""
        return list(self._busy)

    def start(self, name: str, function: Callable[..., None], *arguments: object) -> None:
        """Let a process that does nothing call a function of a module."""
        worker = self._idle.pop() if self._idle else _Worker(self._free.pop(), self.number)
        worker.started = time.monotonic()
        worker.connection.send((function, arguments))
        self._busy[name] = worker

    def ended(self, seconds: float) -> list[Ended]:
        """Return the calls that have ended; wait for the first one, but no longer than so many seconds."""
        ready = wait([worker.connection for worker in self._busy.values()], max(seconds, 0))
        found = []
        for name, worker in list(self._busy.items()):
            if worker.connection not in ready:
                continue
            del self._busy[name]
            try:
                failure = worker.connection.recv()
                self._idle.append(worker)
            except EOFError:
                worker.process.join()
                failure = f"its process ended with exit code {worker.process.exitcode}"
                self._free.append(worker.device)
            found.append(Ended(name, time.monotonic() - worker.started, failure))
        return found

    def close(self) -> None:
        """End all processes, those that run too."""
        workers = [*self._idle, *self._busy.values()]
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(_GRACE)
            worker.process.kill()


class _Worker:
    def __init__(self, device: str | None, number: int):
        self.device, self.started = device, 0.0
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, device, number), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is noticed


def _serve(connection: Connection, device: str | None, number: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // number)))
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that what is half made is removed
    import torch

    from keyreduce.models.loading import prepare_backend
    from keyreduce.models.tuning import tune_few_variants

    prepare_backend(torch.device("cpu" if device is None else "cuda"))
    tune_few_variants()
    while True:
        try:
            function, arguments = connection.recv()
            function(*arguments)
            torch.cuda.empty_cache()  # for others on the same GPU; without one it does nothing
            connection.send(None)
        except (EOFError, KeyboardInterrupt):
            return
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            connection.send(f"{type(error).__name__}: {error}")

"""One measurement shared out among the processes of ``torchrun``.

Each process takes every n-th batch, on its own device. Nothing is exchanged until all are done; then each learns what
the others found. What is found per batch does not depend on who ran it, and sums are taken over the same numbers, so
that a figure is the same from any number of processes.
"""

import datetime
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from keyreduce.errors import KeyreduceError

T = TypeVar("T")

_LONGEST = datetime.timedelta(days=7)  # for which the first to finish waits for the last


def command_line() -> str:
    """Return what started this process, for records: settings from the environment are not in it."""
    program, *arguments = sys.argv or [""]
    return shlex.join([Path(program).name or "python", *arguments])


def is_torchrun() -> bool:
    """Return whether ``torchrun`` started this process. ``WORLD_SIZE`` alone does not say so: clusters set it too."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_rank() -> int:
    """Return the number of this process among those of ``torchrun``; 0 where it is alone."""
    return int(os.environ["RANK"]) if is_torchrun() else 0


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
        """Do this process's share, and return what each process found, in the order of their ranks.

        Args:
            work: returns a JSON object.

        Raises:
            KeyreduceError: ``work`` raised it, here or in another process. Only the first process says so: the others
                end with exit code 2.
        """
        if self.number == 1:
            return [work()]
        try:
            found = {"found": work()}
        except KeyreduceError as error:
            found = {"error": str(error)}
        everyone = _exchange(json.dumps(found).encode(), self.number)
        for one in everyone:
            if "error" in one:
                if self.rank:
                    raise SystemExit(2)
                raise KeyreduceError(one["error"])
        return [one["found"] for one in everyone]


def _exchange(own: bytes, number: int) -> list[dict]:
    """Give all processes what each of them has: JSON, so that no pickle is read."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_LONGEST)
    try:
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(number)]
        dist.all_gather(sizes, torch.tensor([len(own)]))
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
        everyone = [torch.empty_like(padded) for _ in range(number)]
        dist.all_gather(everyone, padded)
        return [json.loads(one[:size].numpy().tobytes()) for one, size in zip(everyone, sizes, strict=True)]
    finally:
        dist.destroy_process_group()

"""Sums over text that the processes of ``torchrun`` share out: each takes every n-th batch, and at the end they add."""

import datetime
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from keyreduce.calibration.statistics import LayerStatistics

T = TypeVar("T")
_LONGEST = datetime.timedelta(days=7)  # for which the first to finish waits for the last


class Group(Protocol):
    """Which process this is, of how many, as :class:`keyreduce.evaluation.processes.Processes` says it."""

    rank: int
    number: int

    def own(self, items: Iterable[T]) -> Iterator[T]:
        """Yield this process's share."""


def add_up(layers: dict[int, LayerStatistics], tokens: int) -> tuple[dict[int, LayerStatistics], int]:
    """Return the sums and the number of tokens of all processes together, the same in each, on the CPU.

    Every process calls it once; where one ends before that, torchrun ends the others.
    """
    dist.init_process_group("gloo", timeout=_LONGEST)
    try:
        count = torch.tensor(tokens, dtype=torch.int64)
        dist.all_reduce(count)
        added = {}
        for layer in sorted(layers):
            tensors = {name: tensor.clone() for name, tensor in sorted(layers[layer].tensors().items())}
            for tensor in tensors.values():
                dist.all_reduce(tensor)
            added[layer] = LayerStatistics.of_tensors(tensors)
        return added, int(count)
    finally:
        dist.destroy_process_group()

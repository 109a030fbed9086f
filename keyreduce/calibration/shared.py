"""Calibration in several processes of ``torchrun``: each takes every n-th batch, and at the end they add up."""

import contextlib
import datetime
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from keyreduce.calibration.statistics import TAYLOR, LayerStatistics

T = TypeVar("T")
_LONGEST = datetime.timedelta(days=7)  # how long the first process to finish waits for the last


class Group(Protocol):
    """Which process this is, of how many, as :class:`keyreduce.processes.Processes` says it."""

    rank: int
    number: int

    def own(self, items: Iterable[T]) -> Iterator[T]:
        """Yield this process's share."""
        ...


@contextlib.contextmanager
def adding() -> Iterator[Callable[[torch.Tensor], None]]:
    """While the block runs, give a function that sums a tensor over all processes, in place.

    Every process must call it equally often, with tensors of the same shapes; if one ends before that, torchrun ends
    the others.
    """

    def add(tensor: torch.Tensor) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=_LONGEST)
        total = tensor.cpu()
        dist.all_reduce(total)
        tensor.copy_(total)

    try:
        yield add
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def add_up(
    layers: dict[int, LayerStatistics], tokens: int, add: Callable[[torch.Tensor], None]
) -> tuple[dict[int, LayerStatistics], int]:
    """Return the statistics and the number of tokens of all processes together, the same in each, on the CPU.

    Statistics of gradients are added up before (:func:`keyreduce.calibration.taylor.differentiating`).

    Args:
        layers, tokens: the statistics and the number of tokens of this process.
        add: the function that :func:`adding` gives.
    """
    count = torch.tensor(tokens, dtype=torch.int64)
    add(count)
    added = {}
    for layer in sorted(layers):
        tensors = {name: tensor.clone() for name, tensor in sorted(layers[layer].tensors().items())}
        for name, tensor in tensors.items():
            if not name.startswith(TAYLOR):
                add(tensor)
        added[layer] = LayerStatistics.of_tensors(tensors)
    return added, int(count)

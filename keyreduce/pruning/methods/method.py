"""What a pruning method is: a pure function with its name, its source and its needs beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Only for the types: the names of the methods appear in --help, which must not wait for torch.
    import torch

    from keyreduce.calibration.statistics import LayerStatistics


@dataclass(frozen=True)
class LayerView:
    """What a method may look at: one layer's projections and, if it needs them, its calibration sums.

    Shapes: H key heads, K key channels, D hidden. Weights are float32.
    """

    query_weight_HKD: torch.Tensor
    key_weight_HKD: torch.Tensor
    statistics: LayerStatistics | None


@dataclass(frozen=True)
class Method:
    """A way to choose key channels.

    Attributes:
        name: what ``--method`` calls it.
        summary: one line for ``--help``.
        citation: where it comes from.
        needs_statistics: whether it reads ``LayerView.statistics``.
        select: ``(layer, keep, generator) -> kept channels``, a LongTensor ``[H, keep]`` whose rows ascend. It depends
            on its arguments alone; ties break by lower index.
    """

    name: str
    summary: str
    citation: str
    needs_statistics: bool
    select: Callable[[LayerView, int, torch.Generator], torch.Tensor]


def highest(score_HK: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the ``keep`` highest-scoring channels of each head, ascending, ``[H, keep]``."""
    by_score_HK = score_HK.sort(dim=-1, descending=True, stable=True).indices
    return by_score_HK[:, :keep].sort(dim=-1).values

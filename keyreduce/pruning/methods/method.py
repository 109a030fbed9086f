"""What a pruning method is: pure functions, one for each target, with its name, its source and its needs beside them.

Shapes: H key heads, W value heads, K key channels and V value channels of a head, D hidden, R kept. A target has
G groups of C channels to choose from: ``key`` H groups of K, ``value`` W groups of V, ``head`` one group of H.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from keyreduce.errors import KeyreduceError

if TYPE_CHECKING:
    # Only for the types: the names of the methods appear in the help, which must not wait for torch.
    import torch

    from keyreduce.calibration.statistics import LayerStatistics
    from keyreduce.families import MixerSizes

TARGETS = ("key", "value", "head")


@dataclass(frozen=True)
class LayerView:
    """What a method may look at: one layer's projections, read when asked for, and its calibration sums.

    Attributes:
        sizes: the layer's sizes.
        sums: the calibration sums, where the method says that it needs them; methods take them as ``statistics``.
        projection: gives the weight of the query, key, value or output projection by that word, float32; its rows
            are the projection's channels, so that the output projection comes transposed.
    """

    sizes: MixerSizes
    sums: LayerStatistics | None
    projection: Callable[[str], torch.Tensor]

    @property
    def statistics(self) -> LayerStatistics:
        """The layer's calibration sums.

        Raises:
            KeyreduceError: there are none, since the method does not say that it needs them.
        """
        if self.sums is None:
            raise KeyreduceError("a method that reads the calibration sums says so, with needs_statistics=True")
        return self.sums

    @cached_property
    def query_weight_HKD(self) -> torch.Tensor:
        """Rows of the query projection."""
        return self.projection("query").unflatten(0, (self.sizes.key_heads, -1))

    @cached_property
    def key_weight_HKD(self) -> torch.Tensor:
        """Rows of the key projection."""
        return self.projection("key").unflatten(0, (self.sizes.key_heads, -1))

    @cached_property
    def value_weight_WVD(self) -> torch.Tensor:
        """Rows of the value projection."""
        return self.projection("value").unflatten(0, (self.sizes.value_heads, -1))

    @cached_property
    def output_weight_WVD(self) -> torch.Tensor:
        """Columns of the output projection: what each value channel adds to each hidden channel."""
        return self.projection("output").unflatten(0, (self.sizes.value_heads, -1))

    def in_groups(self, amount_W: torch.Tensor) -> torch.Tensor:
        """Return amounts of value heads summed over those that share a key head, ``[H]``."""
        return amount_W.unflatten(0, (self.sizes.key_heads, -1)).sum(1)


@dataclass(frozen=True)
class Selection:
    """What a method chose in one layer.

    Attributes:
        kept_GR: kept channels of each group, LongTensor with ascending rows; None where channels are mixed instead.
        projection_HKR: orthonormal columns by which queries and keys are projected, instead of a choice.
        report: figures for the record, each a list with one entry a group.
    """

    kept_GR: torch.Tensor | None
    projection_HKR: torch.Tensor | None = None
    report: Mapping[str, list] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to choose.

    Attributes:
        name: what ``method`` calls it.
        summary: one line for the help.
        citation: where it comes from.
        select: target -> ``(layer, keep, generator, **options) -> Selection``. It depends on its arguments alone;
            ties break by lower index.
        needs_statistics: whether it reads ``LayerView.statistics``.
        needs_gradients: whether those must hold ``taylor``, which a calibration with gradients adds.
        options: the options it takes, with their defaults; ``set NAME=VALUE`` gives another value of the same type.
        check: raises KeyreduceError where an option has a value that it cannot have.
        moments: of a method that projects: ``(statistics, **options) -> [H, K, K]``, whose eigenvalues are the variance
            by which ``variance`` finds the rank.
        version: raised when the method chooses otherwise than before, so that older outputs are not taken for its own.
        unfit: tells why a model of some config cannot be pruned by it, or returns None.
    """

    name: str
    summary: str
    citation: str
    select: Mapping[str, Callable[..., Selection]]
    needs_statistics: bool = False
    needs_gradients: bool = False
    options: Mapping[str, object] = field(default_factory=dict)
    check: Callable[[Mapping[str, object]], None] = lambda options: None
    moments: Callable[..., torch.Tensor] | None = None
    unfit: Callable[[Mapping], str | None] = lambda config: None
    version: int = 1


def highest(score_GC: torch.Tensor, keep: int) -> Selection:
    """Keep the ``keep`` highest-scoring channels of each group.

    Raises:
        KeyreduceError: a score is NaN.
    """
    if score_GC.isnan().any():
        raise KeyreduceError("the method scored a channel NaN; is the calibration damaged, or the method wrong?")
    by_score_GC = score_GC.sort(dim=-1, descending=True, stable=True).indices
    return Selection(by_score_GC[:, :keep].sort(dim=-1).values)


def ranked(score: Callable[..., torch.Tensor]) -> Callable[..., Selection]:
    """Make a function that selects of one that scores: ``(layer, **options) -> score_GC``, the higher the better."""

    def select(layer: LayerView, keep: int, generator: torch.Generator, **options) -> Selection:
        return highest(score(layer, **options), keep)

    return select


def all_targets(key: Callable[..., torch.Tensor], value: Callable[..., torch.Tensor]) -> dict[str, Callable]:
    """Return ``Method.select`` for scores of key and value channels; a head's score is the sum of its channels'."""

    def head(layer: LayerView, **options) -> torch.Tensor:
        score_H = key(layer, **options).sum(-1) + layer.in_groups(value(layer, **options).sum(-1))
        return score_H[None]

    return {"key": ranked(key), "value": ranked(value), "head": ranked(head)}

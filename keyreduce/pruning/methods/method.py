"""The interface of a pruning method: a pure function for each target, with its name, its source and what it needs.

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
    # Only for the types: the help of the command line lists the methods, and must not wait for torch.
    import torch

    from keyreduce.calibration.statistics import LayerStatistics
    from keyreduce.families import MixerSizes

TARGETS = ("key", "value", "head")


@dataclass(frozen=True)
class LayerView:
    """One layer as a method sees it: the weights of its projections, read when they are first used, and its statistics.

    Attributes:
        optional_statistics: the calibration statistics, or None if the method does not declare that it needs them.
        projection: returns the weight of the "query", "key", "value" or "output" projection, float32; its rows are the
            projection's channels, so that the weight of the output projection is transposed.
    """

    sizes: MixerSizes
    optional_statistics: LayerStatistics | None
    projection: Callable[[str], torch.Tensor]

    @property
    def statistics(self) -> LayerStatistics:
        """The layer's calibration statistics; KeyreduceError if the method does not declare that it needs them."""
        if self.optional_statistics is None:
            raise KeyreduceError("a method that reads statistics must declare so, with needs_statistics=True")
        return self.optional_statistics

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
        kept_GR: kept channels of each group, LongTensor with ascending rows; None if they are projected instead.
        projection_HKR: orthonormal columns onto which queries and keys are projected, instead of a choice.
        report: metrics for the record, each a list with one entry for each group.
    """

    kept_GR: torch.Tensor | None
    projection_HKR: torch.Tensor | None = None
    report: Mapping[str, list] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to choose what stays.

    Attributes:
        name: the name by which users select it.
        summary, citation: one line for the help, and its source.
        select: target -> ``(layer, keep, generator, **options) -> Selection``. It depends on its arguments alone;
            ties break by lower index.
        needs_statistics: whether it reads ``LayerView.statistics``.
        needs_gradients: whether the statistics must include ``taylor``, those of a calibration with gradients.
        options: its options with their defaults; users can set other values of the same type.
        check: raises KeyreduceError if the value of an option is invalid.
        moments: for a method that projects, ``(statistics, **options) -> [H, K, K]``; the eigenvalues are the variance
            that decides the rank, if a share of the variance is to be kept.
        parts: for a method that only chooses among others, target -> the one that runs.
        version: raised when the method chooses otherwise than before, so that older outputs are not taken for its own.
        unfit: returns the reason why a model with some config cannot be pruned by it, or None.
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
    parts: Mapping[str, Method] = field(default_factory=dict)
    unfit: Callable[[Mapping], str | None] = lambda config: None
    version: int = 1


def highest(score_GC: torch.Tensor, keep: int) -> Selection:
    """Keep the ``keep`` highest-scoring channels of each group; KeyreduceError if a score is NaN."""
    if score_GC.isnan().any():
        raise KeyreduceError("the method gave a NaN score: the calibration file is damaged, or the method is wrong")
    by_score_GC = score_GC.sort(dim=-1, descending=True, stable=True).indices
    return Selection(by_score_GC[:, :keep].sort(dim=-1).values)


def ranked(score: Callable[..., torch.Tensor]) -> Callable[..., Selection]:
    """Return a ``Method.select`` function that keeps the highest of ``score(layer, **options)``, ``[G, C]``."""

    def select(layer: LayerView, keep: int, generator: torch.Generator, **options) -> Selection:
        return highest(score(layer, **options), keep)

    return select


def all_targets(key: Callable[..., torch.Tensor], value: Callable[..., torch.Tensor]) -> dict[str, Callable]:
    """Return ``Method.select`` for scores of key and value channels; a head's score is the sum over its channels."""

    def head(layer: LayerView, **options) -> torch.Tensor:
        score_H = key(layer, **options).sum(-1) + layer.in_groups(value(layer, **options).sum(-1))
        return score_H[None]

    return {"key": ranked(key), "value": ranked(value), "head": ranked(head)}

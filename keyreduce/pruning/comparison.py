"""How alike the choices of two calibrations or two pruned models are, layer by layer.

Shapes: as in :mod:`keyreduce.pruning.methods.method`; G groups of C channels, of which R are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from keyreduce.calibration.statistics import LayerStatistics, Statistics
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.kept import Kept
from keyreduce.families import MixerSizes
from keyreduce.pruning.methods.energy import SCORES
from keyreduce.pruning.methods.method import TARGETS, LayerView, highest


def compare_statistics(first: Statistics, second: Statistics, share: float) -> list[dict[str, Any]]:
    """Return for each layer how alike two calibrations score its channels and heads by their energy.

    An entry has the ``layer``, and for each target ``overlap``, the share that both keep of what one keeps where
    ``share`` of the channels or heads is removed, and ``correlation``, Spearman's of the scores; both are means over
    heads. A correlation is None where there is one channel or head to rank.

    Raises KeyreduceError if the calibrations are of models of different sizes.
    """
    views = [{layer: _view(sums) for layer, sums in one.layers.items()} for one in (first, second)]
    _refuse_other_sizes(*({layer: view.sizes for layer, view in one.items()} for one in views))
    rows = []
    for layer in sorted(views[0]):
        row: dict[str, Any] = {"layer": layer}
        for target in TARGETS:
            ours_GC, theirs_GC = (SCORES[target](one[layer]) for one in views)
            keep = max(1, round(ours_GC.shape[1] * (1 - share)))
            ours_GR, theirs_GR = (highest(scores, keep).kept_GR for scores in (ours_GC, theirs_GC))
            assert ours_GR is not None and theirs_GR is not None
            row[target] = {
                "overlap": mean(map(_overlap, ours_GR.tolist(), theirs_GR.tolist())),
                "correlation": _rank_correlation(ours_GC, theirs_GC),
            }
        rows.append(row)
    return rows


def compare_kept(first: Mapping[int, Kept], second: Mapping[int, Kept]) -> list[dict[str, Any]]:
    """Return for each layer how much of what two models keep of their dense model is the same.

    An entry has the ``layer``, and for each target ``overlap``, the share that both keep of what the larger one keeps;
    that of channels is a mean over the heads that both keep. It is None where there is no such head, or queries and
    keys were projected. A layer that only one of the models changed is whole in the other.

    Raises KeyreduceError if the dense models have different sizes.
    """
    whole = [{layer: _whole(one.before) for layer, one in other.items()} | dict(own)
             for own, other in ((first, second), (second, first))]  # fmt: skip
    _refuse_other_sizes(*({layer: one.before for layer, one in kept.items()} for kept in whole))
    rows = []
    for layer in sorted(whole[0]):
        ours, theirs = (kept[layer] for kept in whole)
        row: dict[str, Any] = {"layer": layer}
        row["key"] = {"overlap": _of_heads(ours, theirs, lambda one: one.key_heads, lambda one: one.key)}
        row["value"] = {"overlap": _of_heads(ours, theirs, lambda one: one.value_heads, lambda one: one.value)}
        row["head"] = {"overlap": _overlap(ours.key_heads, theirs.key_heads)}
        rows.append(row)
    return rows


def mean_overlaps(rows: Sequence[Mapping]) -> dict[str, float]:
    """Return target -> the mean overlap over layers, for targets of which some layer has one."""
    found = {target: [row[target]["overlap"] for row in rows] for target in TARGETS}
    known = {target: [one for one in overlaps if one is not None] for target, overlaps in found.items()}
    return {target: mean(overlaps) for target, overlaps in known.items() if overlaps}


def _view(sums: LayerStatistics) -> LayerView:
    def projection(name: str) -> torch.Tensor:
        raise AssertionError(f"a score of energy reads no weights, and not {name}")

    sizes = (*sums.key_gram_HKK.shape[:2], *sums.output_gram_WVV.shape[:2])
    return LayerView(MixerSizes(sizes[0], sizes[2], sizes[1], sizes[3]), sums, projection)


def _refuse_other_sizes(first: Mapping[int, MixerSizes], second: Mapping[int, MixerSizes]) -> None:
    if first != second:
        raise KeyreduceError("they are of models whose layers have different sizes: nothing can be compared")


def _overlap(ours: Sequence[int], theirs: Sequence[int]) -> float:
    return len({*ours} & {*theirs}) / max(len(ours), len(theirs))


def _of_heads(
    ours: Kept, theirs: Kept, heads: Callable[[Kept], list[int]], channels: Callable[[Kept], list[list[int]] | None]
) -> float | None:
    """The mean overlap of the channels of the heads that both keep."""
    of_ours, of_theirs = channels(ours), channels(theirs)
    if of_ours is None or of_theirs is None:
        return None
    mine, other = dict(zip(heads(ours), of_ours, strict=True)), dict(zip(heads(theirs), of_theirs, strict=True))
    overlaps = [_overlap(mine[head], other[head]) for head in mine.keys() & other.keys()]
    return mean(overlaps) if overlaps else None


def _whole(sizes: MixerSizes) -> Kept:
    keys = [list(range(sizes.head_k_dim)) for _ in range(sizes.key_heads)]
    values = [list(range(sizes.head_v_dim)) for _ in range(sizes.value_heads)]
    return Kept(sizes, sizes, [*range(sizes.key_heads)], [*range(sizes.value_heads)], keys, values)


def _rank_correlation(ours_GC: torch.Tensor, theirs_GC: torch.Tensor) -> float | None:
    """Spearman's correlation of each row, averaged; equal scores are ranked in order."""
    if ours_GC.shape[1] < 2:
        return None
    ranks = [scores.argsort(dim=-1, stable=True).argsort(dim=-1).double() for scores in (ours_GC, theirs_GC)]
    ours, theirs = (rank_GC - rank_GC.mean(-1, keepdim=True) for rank_GC in ranks)
    return float(((ours * theirs).sum(-1) / (ours.norm(dim=-1) * theirs.norm(dim=-1))).mean())

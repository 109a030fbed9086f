"""Budgets that come from the calibration: ranks by variance, and channels shared out among the layers by energy.

Shapes: H key heads, K key channels of a head.
"""

from collections.abc import Mapping

import torch

from keyreduce.calibration.statistics import LayerStatistics
from keyreduce.families import Family
from keyreduce.pruning.methods import Method


def by_energy(
    statistics: Mapping[int, LayerStatistics], keep: Mapping[int, int], multiple_of: int = 1
) -> dict[int, int]:
    """Share out the key channels of all layers by energy; as many stay in all as with ``keep``.

    A layer's next channel is worth the share of a head's energy of q and k that it adds, averaged over the layer's
    heads; channels go where that is largest, each layer having ``multiple_of`` at least.

    Args:
        statistics: layer -> sums.
        keep: layer -> how many channels a head would keep, multiples of ``multiple_of``.
        multiple_of: the step in which channels are given out.
    """
    worth = {}
    for layer, sums in statistics.items():
        energy_HK = (sums.query_gram_HKK + sums.key_gram_HKK).diagonal(dim1=-2, dim2=-1)
        share_HK = energy_HK.sort(descending=True).values / energy_HK.sum(-1, keepdim=True)
        # A head without energy has no say, a layer without any gets what it must.
        share_K = share_HK.nanmean(0).nan_to_num(0)
        steps = share_K[: len(share_K) // multiple_of * multiple_of].view(-1, multiple_of).sum(-1)
        worth[layer] = steps.tolist()
    given = dict.fromkeys(worth, 1)
    for _ in range(sum(keep.values()) // multiple_of - len(given)):
        # Of equal ones the lower layer.
        layer = max(worth, key=lambda layer: worth[layer][given[layer]] if given[layer] < len(worth[layer]) else -1.0)
        given[layer] += 1
    return {layer: steps * multiple_of for layer, steps in given.items()}


def by_variance(
    family: Family,
    statistics: Mapping[int, LayerStatistics],
    variance: float,
    method: Method,
    options: Mapping[str, object],
    *,
    multiple_of: int = 1,
) -> dict[int, int]:
    """Return the smallest rank of a projection that keeps a share of the variance, on average over the heads.

    Args:
        family: where its config can say a size for each layer, each has its own rank; else all have one.
        statistics: layer -> sums.
        variance: the share, above 0 and at most 1.
        method: what projects; it says what the variance is of.
        options: of the method.
        multiple_of: round up to a multiple, or down to the largest that a head has.
    """
    kept = {}
    for layer, sums in statistics.items():
        value_HK = torch.linalg.eigvalsh(method.moments(sums, **options)).flip(-1).clamp(min=0)
        # Where a head or a layer has no variance, 0 / 0, any rank keeps it.
        kept[layer] = (value_HK.cumsum(-1) / value_HK.sum(-1, keepdim=True)).nanmean(0)
    if "head_k_dim" not in family.per_layer:
        kept = dict.fromkeys(kept, torch.stack(list(kept.values())).nanmean(0))
    ranks = {}
    for layer, kept_K in kept.items():
        # Sums of rounded numbers may end a little below the whole.
        rank = int((kept_K < variance - 1e-9).sum()) + 1
        ranks[layer] = min(-(-rank // multiple_of), len(kept_K) // multiple_of) * multiple_of
    return ranks

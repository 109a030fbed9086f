"""Sizes that follow from the statistics: ranks by variance, and key channels distributed over the layers by energy.

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
    """Distribute the key channels over the layers by energy: layer -> how many stay, with the same total as ``keep``.

    A layer's next channel is worth the share of a head's energy of q and k that it adds, averaged over the layer's
    heads. Channels go to the layer where that is largest; each layer has at least ``multiple_of``.

    Args:
        keep: layer -> how many channels a head would keep, multiples of ``multiple_of``.
        multiple_of: the step in which channels are distributed.
    """
    worth = {}
    for layer, of_layer in statistics.items():
        energy_HK = (of_layer.query_gram_HKK + of_layer.key_gram_HKK).diagonal(dim1=-2, dim2=-1)
        share_HK = energy_HK.sort(descending=True).values / energy_HK.sum(-1, keepdim=True)
        # Heads without energy (0 / 0) do not count; a layer of such heads gets the least.
        share_K = share_HK.nanmean(0).nan_to_num(0)
        steps = share_K[: len(share_K) // multiple_of * multiple_of].view(-1, multiple_of).sum(-1)
        worth[layer] = steps.tolist()
    given = dict.fromkeys(worth, 1)
    for _ in range(sum(keep.values()) // multiple_of - len(given)):
        # Ties go to the lower layer.
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
        family: if its config has a size for each layer, each gets its own rank; otherwise all get the same.
        variance: the share, above 0 and at most 1.
        method: the method that projects; its ``moments`` define the variance.
        multiple_of: ranks are rounded up to a multiple, or down to the largest one that a head has.
    """
    assert method.moments is not None  # the budget was checked
    kept = {}
    for layer, of_layer in statistics.items():
        value_HK = torch.linalg.eigvalsh(method.moments(of_layer, **options)).flip(-1).clamp(min=0)
        # Heads and layers without variance (0 / 0) do not count: any rank keeps it.
        kept[layer] = (value_HK.cumsum(-1) / value_HK.sum(-1, keepdim=True)).nanmean(0)
    if "head_k_dim" not in family.per_layer:
        kept = dict.fromkeys(kept, torch.stack(list(kept.values())).nanmean(0))
    ranks = {}
    for layer, kept_K in kept.items():
        # Rounding may leave the total a little below 1.
        rank = int((kept_K < variance - 1e-9).sum()) + 1
        ranks[layer] = min(-(-rank // multiple_of), len(kept_K) // multiple_of) * multiple_of
    return ranks

"""How much a cut will cost, predicted from the calibration statistics alone: a score that ranks sizes.

The score of a cut is a mean over layers of

    weight * sum_h e_h (-log s_h) + sum_h e_h r_h  +  the energy share of the heads that go

over the key heads h that stay, with e_h a head's share of the squares of the mixer's output. s_h is the share of the
squares of its normalised keys that the kept key channels hold: ``-log s_h`` grows as ``1 / s_h`` does, by which keys
overwrite each other more. r_h is the share of the squares of what its value heads add to the mixer's output that no
linear map of the kept value channels gives: the residual of the least squares that the output projection's refit is,
from the Gram matrix of the projection's input.

For both, channels are taken in the order of their energy. So one Cholesky factorisation a head gives r_h for all
numbers of value channels: with ``G = L L^T`` in that order and W the projection's rows, the squares of the rows of
``L^T W`` from the R-th on are what the first R channels cannot give.

How well it ranks is measured by benchmarks/state_budget.py; the results are in docs/state-budget.md.

Shapes: H key heads, W value heads, K key channels, V value channels, D hidden.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from keyreduce.calibration.statistics import LayerStatistics, Statistics
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.families import MixerSizes, family_of
from keyreduce.pruning.planning import layer_view

KEY_WEIGHT = {None: 0.5, "least-squares": 0.35, "reconstruct": 0.35}
"""Recovery that follows the cut -> the weight of the keys' part. It wins back more of what keys cost than of values."""


class Curves(NamedTuple):
    """What a layer loses, by how much of it stays.

    Attributes:
        energy_H: each key head's share of the squares of the mixer's output, in descending order.
        key_HK: ``-log s_h`` with the first 1 to K key channels of each of these heads.
        value_HV: ``r_h`` with the first 1 to V value channels.
    """

    energy_H: torch.Tensor
    key_HK: torch.Tensor
    value_HV: torch.Tensor


def curves_of(statistics: LayerStatistics, sizes: MixerSizes, output_weight_WVD: torch.Tensor) -> Curves:
    """Return the curves of one layer, float64, from its statistics and the rows of its output projection's weight."""
    groups = (sizes.key_heads, -1)
    squares_WV = _squares(statistics.output_gram_WVV, output_weight_WVD.double())
    squares_HV = squares_WV.unflatten(0, groups).sum(1)
    energy_H, order_H = squares_HV.sum(-1).sort(descending=True, stable=True)
    value_HV = 1 - _cumulative_share(squares_HV)
    raw_HK = _diagonal(statistics.query_gram_HKK) + _diagonal(statistics.key_gram_HKK)
    order_HK = raw_HK.sort(dim=-1, descending=True, stable=True).indices
    key_HK = -_cumulative_share(_diagonal(statistics.unit_key_gram_HKK).gather(1, order_HK)).clamp(min=1e-6).log()
    total = energy_H.sum().clamp(min=torch.finfo(energy_H.dtype).tiny)
    return Curves(energy_H / total, key_HK[order_H], value_HV[order_H].clamp(min=0))


def read_curves(source: Checkpoint, statistics: Statistics) -> dict[int, Curves]:
    """Return layer -> its curves; the weights of the output projections are read from the checkpoint."""
    family = family_of(source.config, source.tensors)
    found = {}
    for layer, sizes in family.layer_sizes(source.config).items():
        view = layer_view(source, family, layer, sizes, statistics)
        found[layer] = curves_of(view.statistics, sizes, view.output_weight_WVD)
    return found


def predicted_loss(layers: Mapping[int, Curves], sizes: MixerSizes, recovery: str | None = None) -> float:
    """Return the score of a cut that leaves all layers of these sizes: the higher, the more it costs, without a unit.

    ``recovery`` is the mode of the recovery that will follow, if one will.
    """
    return predicted_losses(layers, [sizes], recovery)[0]


def predicted_losses(
    layers: Mapping[int, Curves], grid: Sequence[MixerSizes], recovery: str | None = None
) -> list[float]:
    """Return the score of each of many cuts, see :func:`predicted_loss`. Layers are summed up once for all of them."""
    curves = layers.values()
    energy_H = torch.stack([one.energy_H for one in curves]).mean(0)
    # The sum over the first heads of the mean over layers, for all numbers of heads and channels.
    key_HK = torch.stack([one.energy_H[:, None] * one.key_HK for one in curves]).mean(0).cumsum(0)
    value_HV = torch.stack([one.energy_H[:, None] * one.value_HV for one in curves]).mean(0).cumsum(0)
    keys, values = (KEY_WEIGHT[recovery] * key_HK).tolist(), value_HV.tolist()
    gone = (1 - energy_H.cumsum(0)).clamp(min=0).tolist()
    places = [(sizes.key_heads - 1, sizes.head_k_dim - 1, sizes.head_v_dim - 1) for sizes in grid]
    return [keys[head][key] + values[head][value] + gone[head] for head, key, value in places]


def _squares(gram_WVV: torch.Tensor, weight_WVD: torch.Tensor) -> torch.Tensor:
    """Return the squares of the rows of ``L^T W`` of each head, ``[W, V]``, in the order of the channels' energy."""
    order_WV = _diagonal(gram_WVV).sort(dim=-1, descending=True, stable=True).indices
    rows_W1 = torch.arange(len(gram_WVV))[:, None]
    gram_WVV = gram_WVV[rows_W1[..., None], order_WV[:, :, None], order_WV[:, None]]
    # Channels without energy of their own would end the factorisation.
    mean_W1 = _diagonal(gram_WVV).mean(-1, keepdim=True)
    gram_WVV = gram_WVV + torch.diag_embed((1e-9 * mean_W1 + 1e-30).expand(-1, gram_WVV.shape[-1]))
    factor_WVV = torch.linalg.cholesky(gram_WVV)
    return (factor_WVV.mT @ weight_WVD[rows_W1, order_WV]).square().sum(-1)


def _cumulative_share(square_HC: torch.Tensor) -> torch.Tensor:
    total_H1 = square_HC.sum(-1, keepdim=True)
    return torch.where(total_H1 > 0, square_HC.cumsum(-1) / total_H1, 1.0)


def _diagonal(gram_HKK: torch.Tensor) -> torch.Tensor:
    return gram_HKK.diagonal(dim1=-2, dim2=-1)

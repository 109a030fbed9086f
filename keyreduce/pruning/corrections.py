"""What a cut does to the channels that stay, made good in closed form from the statistics, without text.

- A value channel that goes takes along what the output projection made of it. Part of that can be had from the channels
  of the head that stay: the projection's columns of the channels that go are added to those of the ones that stay, by
  ridge regression of the former channels on the latter (their Gram matrix is among the statistics). This is the update
  of the optimal brain surgeon (Hassibi and Stork 1993) for whole columns.
- The output norm divides a head's output by its root mean square over the value channels that stay. Where they hold the
  share s of the squares, what stays comes out ``s^-1/2`` times as large as it did. The head's columns of the output
  projection are multiplied by ``s^1/2``.
- Queries and keys are L2-normalised after the cut. For queries that is a factor of the head's output, which the output
  norm removes. A key with the share s of its squares is ``s^-1/2`` times as long, so that a token erases and overwrites
  ``1 / s`` times as much of what other keys stored. The writing strength beta is to be s times as large. It is the
  sigmoid of a linear function ``w x`` of the mixer's input, without a bias: w moves along the direction u in which the
  input is nearest to a constant, ``u x = 1`` (``constant_D`` of the statistics), by the difference between the logits
  of s times the mean strength and of the mean strength.

Shares are means over the calibration tokens. A recovery that follows undoes the change of the writing strength: with
the output projection refitted, the strength that the model was trained with is better (docs/state-budget.md).

Shapes: W value heads and H key heads that stay, K key channels, V value channels, D hidden, R kept.
"""

import torch

from keyreduce.calibration.statistics import LayerStatistics
from keyreduce.pruning.plan import Correction, LayerCut

RIDGE = 0.1
"""The ridge of the regression, as a multiple of the mean square of a head's channels that stay."""


def correction_of(cut: LayerCut, statistics: LayerStatistics, tokens: int, largest_beta: float) -> Correction:
    """Return the correction of one layer's cut.

    Args:
        statistics: those of the dense layer.
        tokens: how many tokens they are over.
        largest_beta: the largest writing strength, see :meth:`keyreduce.families.Family.largest_beta`.
    """
    square_WV = statistics.readout_square_WV[cut.value_heads_W]
    value_W = _share(square_WV.gather(1, cut.value_WR).sum(-1), square_WV.sum(-1))
    key_W = key_share(cut, statistics).repeat_interleave(cut.before.value_heads // cut.before.key_heads)
    mean_W = (statistics.beta_W[cut.value_heads_W] / (tokens * largest_beta)).clamp(1e-3, 1 - 1e-3)
    shift_W = torch.logit(mean_W * key_W) - torch.logit(mean_W)
    return Correction(_absorbed(cut, statistics), value_W.sqrt(), shift_W, statistics.constant_D)


def key_share(cut: LayerCut, statistics: LayerStatistics) -> torch.Tensor:
    """Return the share of the squares of normalised keys that stays in each key head that stays, ``[H]``, float64."""
    gram_HKK = statistics.unit_key_gram_HKK[cut.heads_H]
    square_HK = gram_HKK.diagonal(dim1=-2, dim2=-1)
    if cut.projection_HKR is not None:
        kept_H = (cut.projection_HKR.mT @ gram_HKK @ cut.projection_HKR).diagonal(dim1=-2, dim2=-1).sum(-1)
    else:
        assert cut.key_HR is not None  # keys are either chosen or projected
        kept_H = square_HK.gather(1, cut.key_HR).sum(-1)
    return _share(kept_H, square_HK.sum(-1))


def _absorbed(cut: LayerCut, statistics: LayerStatistics) -> torch.Tensor:
    """Return what columns of the output projection are added to each one that stays, ``[W, V, R]``, float32."""
    gram_WVV = statistics.output_gram_WVV[cut.value_heads_W]
    kept_WVR = torch.zeros(*gram_WVV.shape[:2], cut.value_WR.shape[1], dtype=gram_WVV.dtype)
    kept_WVR.scatter_(1, cut.value_WR[:, None], 1.0)
    cross_WRV = kept_WVR.mT @ gram_WVV
    gram_WRR = cross_WRV @ kept_WVR
    ridge_W11 = RIDGE * gram_WRR.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye_RR = torch.eye(gram_WRR.shape[-1], dtype=gram_WRR.dtype)
    safe_W11 = torch.where(ridge_W11 > 0, ridge_W11, 1.0)  # a head that is all zeros has nothing to add
    mix_WVR = torch.linalg.solve(gram_WRR + safe_W11 * eye_RR, cross_WRV).mT
    mix_WVR[kept_WVR.any(-1)] = 0  # the ones that stay are themselves, whatever the ridge
    return (kept_WVR + mix_WVR).float()


def _share(kept: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """A share from just above 0 to 1; 1 of a head that is all zeros."""
    return torch.where(total > 0, kept / total, 1.0).clamp(1e-3, 1.0)

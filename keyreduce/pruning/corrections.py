"""What a cut does to the channels that stay, made good in closed form from the statistics, without text.

Two norms are taken over fewer channels after a cut, and both enlarge what stays:

- The output norm divides a head's output by its root mean square over the value channels that stay. Where they hold the
  share s of the squares, what stays comes out ``s^-1/2`` times as large as it did. The head's columns of the output
  projection are multiplied by ``s^1/2``.
- Queries and keys are L2-normalised after the cut. For queries that is a factor of the head's output, which the output
  norm removes. A key with the share s of its squares is ``s^-1/2`` times as long, so that a token erases ``1 / s`` times
  as much, and two keys overlap ``1 / s`` times as much. The writing strength beta is to be ``s^2`` times as large. It
  is the sigmoid of a linear function ``w x`` of the mixer's input, without a bias: w moves along the direction u in
  which the input is nearest to a constant (``constant_D`` of the statistics), ``u x = 1``, by the difference between
  the logits of the mean strength and of ``s^2`` times that.

Both shares are means over the calibration tokens. The exponents were measured: see docs/state-budget.md.

Shapes: W value heads and H key heads that stay, K key channels, V value channels, D hidden, R kept.
"""

import torch

from keyreduce.calibration.statistics import LayerStatistics
from keyreduce.pruning.plan import Correction, LayerCut

VALUE_POWER = 0.5
"""The power of the share of the squares that is left, by which a head's output is multiplied."""
BETA_POWER = 2.0
"""The power of the share of a key's squares that is left, by which the writing strength is multiplied."""


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
    shift_W = torch.logit(mean_W * key_W**BETA_POWER) - torch.logit(mean_W)
    return Correction(value_W**VALUE_POWER, shift_W, statistics.constant_D)


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


def _share(kept: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """A share from just above 0 to 1; 1 of a head that is all zeros."""
    return torch.where(total > 0, kept / total, 1.0).clamp(1e-3, 1.0)

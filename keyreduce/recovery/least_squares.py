"""The output projection of a pruned mixer, refitted in closed form to what the dense mixer gives.

The correction of the projection is a ridge regression (Hoerl and Kennard 1970): of what is missing of the dense mixer's
output, the residuals ``r_n``, on what the projection receives, the inputs ``z_n``. It is the ``X`` that minimises

    sum_n |r_n - X z_n|^2 + strength * mean(diag(sum_n z_n z_n^T)) * |X|^2

and it is 0 where the residuals are 0, so that the projection stays as it is, bit by bit, and in directions that no
input has. The dense mixer sees the dense model's hidden states, and the pruned mixer sees those that the recovered
layers below it give, so that the correction makes up for their errors too (as in Frantar and Alistarh, "Optimal Brain
Compression", arXiv:2208.11580, section 6, where compressed layers are recalibrated one after another).

Memory is ``2 (C^2 + D C)`` float64 numbers, whatever the number of tokens.

Shapes: B rows, T tokens, N = B * T, D hidden, C channels that the output projection receives.
"""

from collections.abc import Sequence

import torch

from keyreduce.recovery.streams import Stream

STRENGTHS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 0.3, 1.0, 3.0)
CAUTIOUS = 1e-3
"""The strength that is taken where there are too few rows to choose one on."""
HELDOUT_EVERY = 8


class NormalEquations:
    """The sums that ridge regression needs: ``gram_CC``, ``cross_DC``, and ``energy``, of the residuals' squares."""

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu"):
        self.gram_CC = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross_DC = torch.zeros(outputs, inputs, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, inputs_NC: torch.Tensor, residual_ND: torch.Tensor) -> None:
        """Add rows of inputs and the residuals that belong to them."""
        inputs_NC, residual_ND = inputs_NC.double(), residual_ND.double()
        self.gram_CC.addmm_(inputs_NC.T, inputs_NC)
        self.cross_DC.addmm_(residual_ND.T, inputs_NC)
        self.energy += residual_ND.square().sum()

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        total = NormalEquations(0, 0)
        vars(total).update({name: sums + getattr(other, name) for name, sums in vars(self).items()})
        return total

    def solve(self, strengths: Sequence[float]) -> list[torch.Tensor]:
        """Return a correction ``[D, C]``, float64, for each strength, a multiple of the mean square of the inputs.

        Where the sums are not finite, the corrections are not either. The smallest penalty is far above the rounding of
        sums in float64, so that a Cholesky decomposition of finite ones does not fail.
        """
        mean = self.gram_CC.diagonal().mean()
        found = []
        for strength in strengths:
            shifted_CC = self.gram_CC.clone()
            # Where all inputs are 0 there is nothing to correct, and any penalty will do.
            shifted_CC.diagonal().add_(torch.where(mean != 0, strength * mean, 1.0))
            found.append(torch.cholesky_solve(self.cross_DC.T, torch.linalg.cholesky_ex(shifted_CC).L).T)
        return found

    def error(self, correction_DC: torch.Tensor) -> float:
        """Return the sum of squares of the residuals after a correction."""
        explained = 2 * (correction_DC * self.cross_DC).sum()
        return float(self.energy - explained + ((correction_DC @ self.gram_CC) * correction_DC).sum())


def fit(
    fitted: NormalEquations, heldout: NormalEquations | None, strengths: Sequence[float] = STRENGTHS
) -> tuple[torch.Tensor, float]:
    """Choose the strength by the error on held-out rows, or :data:`CAUTIOUS` without, and then solve for all rows.

    Returns:
        The correction ``[D, C]``, float64, and the strength.
    """
    if heldout is None:
        return fitted.solve([CAUTIOUS])[0], CAUTIOUS
    errors = [heldout.error(correction_DC) for correction_DC in fitted.solve(strengths)]
    strength = strengths[errors.index(min(errors))]
    return (fitted + heldout).solve([strength])[0], strength


@torch.no_grad()
def refit_output(pruned: Stream, layer: int, targets: Sequence[torch.Tensor]) -> dict[str, float]:
    """Correct the output projection of a layer, in place, and return figures for the record.

    The strength of the ridge is chosen by the error on every eighth batch, which the fits that are compared leave out.

    Args:
        pruned: the pruned model's stream before the layer, whose block is on the device.
        targets: what the mixer is to give, ``[B, T, D]`` for each batch.
    """
    weight_DC = pruned.projection(layer).weight
    sums = [NormalEquations(weight_DC.shape[1], weight_DC.shape[0], pruned.device) for _ in range(2)]
    energy = torch.zeros((), dtype=torch.float64, device=pruned.device)
    for place, target_BTD in enumerate(targets):
        target_BTD = target_BTD.to(pruned.device)
        inputs_BTC, output_BTD = pruned.see_mixer(layer, place)
        is_heldout = place % HELDOUT_EVERY == HELDOUT_EVERY - 1
        residual_BTD = target_BTD.double() - output_BTD.double()
        sums[is_heldout].add(inputs_BTC.flatten(0, 1), residual_BTD.flatten(0, 1))
        energy += target_BTD.double().square().sum()
    fitted, heldout = sums
    correction_DC, strength = fit(fitted, heldout if len(targets) >= HELDOUT_EVERY else None)
    weight_DC += correction_DC.to(weight_DC.dtype)
    total, energy = fitted + heldout, max(float(energy), torch.finfo(torch.float64).tiny)
    return {
        "ridge": strength,
        "missing_before": float(total.energy) / energy,
        "missing_after": max(total.error(correction_DC), 0.0) / energy,
    }

"""Ridge regression from running sums: the correction of a linear map that removes a residual.

Given inputs ``z_n`` and residuals ``r_n``, the correction is the ``X`` that minimises

    sum_n |r_n - X z_n|^2 + strength * mean(diag(sum_n z_n z_n^T)) * |X|^2

It is 0 where the residuals are 0, and in directions that no input has. Source: Hoerl and Kennard 1970. The normal
equations accumulate in float64, and their size does not depend on the number of rows.

Shapes: N rows, C inputs, D outputs.
"""

from collections.abc import Sequence

import torch

STRENGTHS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CAUTIOUS = 1e-3
"""The strength that is taken where there are too few rows to choose one on."""


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
        for name, sums in vars(self).items():
            setattr(total, name, sums + getattr(other, name))
        return total

    def solve(self, strengths: Sequence[float]) -> list[torch.Tensor]:
        """Return a correction ``[D, C]``, float64, for each strength, a multiple of the mean square of the inputs."""
        value_C, vector_CC = torch.linalg.eigh(self.gram_CC)
        value_C = value_C.clamp(min=0)
        mean = value_C.mean()
        turned_DC = self.cross_DC @ vector_CC
        # Where all inputs are 0 there is nothing to correct.
        factors = [torch.where(mean > 0, 1 / (value_C + strength * mean), 0.0) for strength in strengths]
        return [(turned_DC * factor_C) @ vector_CC.T for factor_C in factors]

    def error(self, correction_DC: torch.Tensor) -> float:
        """Return the sum of squares of the residuals after a correction."""
        explained = 2 * (correction_DC * self.cross_DC).sum()
        return float(self.energy - explained + ((correction_DC @ self.gram_CC) * correction_DC).sum())


def fit(
    fitted: NormalEquations, heldout: NormalEquations | None, strengths: Sequence[float] = STRENGTHS
) -> tuple[torch.Tensor, float]:
    """Choose the strength by the error on held-out rows, and then solve for all rows.

    Args:
        fitted: sums over rows to fit.
        heldout: sums over other rows; None takes the strength :data:`CAUTIOUS`.
        strengths: the strengths to choose from, ascending.

    Returns:
        The correction ``[D, C]``, float64, and the strength.
    """
    if heldout is None:
        return fitted.solve([CAUTIOUS])[0], CAUTIOUS
    errors = [heldout.error(correction_DC) for correction_DC in fitted.solve(strengths)]
    strength = strengths[errors.index(min(errors))]
    return (fitted + heldout).solve([strength])[0], strength

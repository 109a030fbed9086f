"""Ridge regression against numpy's least squares on the stacked problem."""

import numpy as np
import pytest
import torch

from keyreduce.recovery.least_squares import CAUTIOUS, NormalEquations, fit


def draw(rows: int, inputs: int, outputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, columns, generator=generator, dtype=torch.float64) for columns in (inputs, outputs))


def sums_of(inputs_NC: torch.Tensor, residual_ND: torch.Tensor) -> NormalEquations:
    sums = NormalEquations(inputs_NC.shape[1], residual_ND.shape[1])
    sums.add(inputs_NC, residual_ND)
    return sums


def stacked(inputs_NC: torch.Tensor, residual_ND: torch.Tensor, strength: float) -> np.ndarray:
    """The solution of the least-squares problem with the penalty as further rows."""
    penalty = (strength * inputs_NC.square().sum(0).mean().item()) ** 0.5
    C, D = inputs_NC.shape[1], residual_ND.shape[1]
    left = np.concatenate([inputs_NC.numpy(), penalty * np.eye(C)])
    right = np.concatenate([residual_ND.numpy(), np.zeros((C, D))])
    return np.linalg.lstsq(left, right, rcond=None)[0].T


@pytest.mark.parametrize("strength", [1e-7, 1e-3, 1.0])
@pytest.mark.parametrize("sizes", [(50, 7, 5), (5, 7, 3), (7, 1, 1)])
def test_it_solves_the_penalised_least_squares(sizes, strength):
    inputs_NC, residual_ND = draw(*sizes)
    (correction_DC,) = sums_of(inputs_NC, residual_ND).solve([strength])
    np.testing.assert_allclose(correction_DC, stacked(inputs_NC, residual_ND, strength), rtol=1e-5, atol=1e-8)


def test_the_error_is_that_of_the_rows():
    inputs_NC, residual_ND = draw(40, 6, 4)
    correction_DC = draw(4, 6, 1, seed=1)[0]
    expected = (residual_ND - inputs_NC @ correction_DC.T).square().sum().item()
    assert sums_of(inputs_NC, residual_ND).error(correction_DC) == pytest.approx(expected)


def test_batches_in_float32_add_up_in_float64():
    inputs_NC, residual_ND = (tensor.float() for tensor in draw(4096, 6, 4))
    sums = NormalEquations(6, 4)
    for rows_NC, rows_ND in zip(inputs_NC.split(7), residual_ND.split(7), strict=True):
        sums.add(rows_NC, rows_ND)
    torch.testing.assert_close(sums.gram_CC, inputs_NC.double().T @ inputs_NC.double(), rtol=1e-13, atol=1e-10)
    torch.testing.assert_close(sums.cross_DC, residual_ND.double().T @ inputs_NC.double(), rtol=1e-13, atol=1e-10)


def test_no_residual_gives_no_correction_at_all():
    inputs_NC, residual_ND = draw(30, 6, 4)
    sums = sums_of(inputs_NC, torch.zeros_like(residual_ND))
    correction_DC, _ = fit(sums, sums)
    assert not correction_DC.any()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_inputs_of_low_rank_give_a_small_finite_correction(rank):
    """What no input reaches stays; numpy's minimum-norm solution is the limit of ever weaker penalties."""
    left_NC, residual_ND = draw(30, 6, 4)
    inputs_NC = left_NC[:, :rank] @ draw(6, 6, 1, seed=2)[0][:rank]
    (correction_DC,) = sums_of(inputs_NC, residual_ND).solve([1e-9])
    expected = np.linalg.lstsq(inputs_NC.numpy(), residual_ND.numpy(), rcond=None)[0].T
    assert correction_DC.isfinite().all()
    np.testing.assert_allclose(correction_DC, expected, atol=1e-5)


def test_the_strength_is_the_one_that_does_best_on_held_out_rows():
    """Few noisy rows of many inputs: the weakest penalty fits the noise."""
    truth_DC = draw(3, 20, 1, seed=5)[0]
    (inputs_NC, noise_ND), (other_NC, other_noise_ND) = draw(24, 20, 3), draw(400, 20, 3, seed=1)
    fitted = sums_of(inputs_NC, inputs_NC @ truth_DC.T + 5 * noise_ND)
    heldout = sums_of(other_NC, other_NC @ truth_DC.T + 5 * other_noise_ND)
    strengths = (1e-6, 1e-3, 0.1, 1.0, 1e6)
    errors = [
        float((other_NC @ (truth_DC - correction_DC).T + 5 * other_noise_ND).square().sum())
        for correction_DC in fitted.solve(strengths)
    ]
    correction_DC, strength = fit(fitted, heldout, strengths)
    assert strength == strengths[errors.index(min(errors))] not in (1e-6, 1e6)
    # All rows are then fitted, at that strength.
    rows_NC = torch.cat([inputs_NC, other_NC])
    rows_ND = rows_NC @ truth_DC.T + 5 * torch.cat([noise_ND, other_noise_ND])
    np.testing.assert_allclose(correction_DC, stacked(rows_NC, rows_ND, strength), rtol=1e-6, atol=1e-9)


def test_without_held_out_rows_the_strength_is_a_cautious_one():
    inputs_NC, residual_ND = draw(30, 6, 4)
    correction_DC, strength = fit(sums_of(inputs_NC, residual_ND), None)
    assert strength == CAUTIOUS
    np.testing.assert_allclose(correction_DC, stacked(inputs_NC, residual_ND, CAUTIOUS), rtol=1e-6, atol=1e-9)

"""The stable rank of states: both ways to the largest eigenvalue."""

import pytest
import torch

from keyreduce.calibration import statistics


@pytest.mark.parametrize("way", ["decomposition", "powers"])
def test_stable_rank_against_singular_values(way, monkeypatch):
    if way == "powers":  # what a GPU takes
        monkeypatch.setattr(statistics, "_largest_eigenvalue", statistics._power_mean)
    generator = torch.Generator().manual_seed(0)
    state_BWKV = torch.randn(3, 4, 24, 40, generator=generator, dtype=torch.float64)
    values_BWM = torch.linalg.svdvals(state_BWKV)
    wanted_BW = values_BWM.square().sum(-1) / values_BWM[..., 0].square()
    found_BW = statistics.stable_rank(state_BWKV)
    torch.testing.assert_close(found_BW, wanted_BW, rtol=3e-4, atol=0)
    torch.testing.assert_close(statistics.stable_rank(state_BWKV.mT), wanted_BW, rtol=3e-4, atol=0)


def test_powers_of_close_eigenvalues_and_of_extreme_scales():
    diagonal_XM = torch.ones(4, 128, dtype=torch.float64)
    diagonal_XM[0, 1:] = 0.999  # the power method cannot tell these apart, and need not
    diagonal_XM[1, 1:] = 0.0
    diagonal_XM[2] *= 1e-200
    diagonal_XM[3] *= 1e150
    found_X = statistics._power_mean(torch.diag_embed(diagonal_XM))
    torch.testing.assert_close(found_X, diagonal_XM.amax(-1), rtol=1e-3, atol=0)


def test_state_of_zeros_has_rank_0():
    for find in (statistics._largest_eigenvalue, statistics._power_mean):
        assert find(torch.zeros(1, 2, 8, 8, dtype=torch.float64)).eq(0).all()
    assert statistics.stable_rank(torch.zeros(1, 2, 8, 8)).eq(0).all()

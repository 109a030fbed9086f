"""Strong RRQR against what it promises, worked out slowly from the data matrix: determinants, QR and singular values.

Legend: N tokens, K channels, R kept, T dropped.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import qr

from keyreduce.errors import KeyreduceError
from keyreduce.pruning import strong_rrqr as module
from keyreduce.pruning.strong_rrqr import exchange, factorise, strong_rrqr


def others(kept_R, channels: int) -> np.ndarray:
    return np.setdiff1d(np.arange(channels), kept_R)


def log_volume(data_NK: np.ndarray, kept_R) -> float:
    """log |det R11|, from a QR of the kept columns."""
    return np.log(np.abs(np.linalg.qr(data_NK[:, kept_R], mode="r").diagonal())).sum()


def slow_rho(data_NK: np.ndarray, kept_R: np.ndarray) -> float:
    """The largest growth of the volume by one swap, by trying every one."""
    before, largest = log_volume(data_NK, kept_R), 0.0
    for out in range(len(kept_R)):
        for into in others(kept_R, data_NK.shape[1]):
            swapped_R = np.append(np.delete(kept_R, out), into)
            largest = max(largest, np.exp(log_volume(data_NK, swapped_R) - before))
    return largest


def slow_tableau(gram_KK: np.ndarray, kept_R: np.ndarray, dropped_T: np.ndarray) -> np.ndarray:
    inverse_RR = np.linalg.inv(gram_KK[np.ix_(kept_R, kept_R)])
    cross_RT = gram_KK[np.ix_(kept_R, dropped_T)]
    weights_RT = inverse_RR @ cross_RT
    schur_TT = gram_KK[np.ix_(dropped_T, dropped_T)] - cross_RT.T @ weights_RT
    return np.block([[-inverse_RR, weights_RT], [weights_RT.T, schur_TT]])


def kahan(channels: int, cosine: float = 0.4) -> np.ndarray:
    """Kahan's matrix, whose columns pivoting takes as they come though the first is nearly in the span of the rest."""
    graded = (1 - cosine**2) ** (np.arange(channels) / 2)
    lengths = (1 - 1e-4) ** np.arange(channels)
    return graded[:, None] * (np.eye(channels) - cosine * np.triu(np.ones((channels, channels)), 1)) * lengths


def several_kahans(seed: int, groups: int = 4, size: int = 8) -> np.ndarray:
    generator = np.random.default_rng(seed)
    data_KK = np.kron(np.diag(generator.uniform(0.5, 2, groups)), kahan(size, cosine=0.5))
    return data_KK[:, generator.permutation(groups * size)] + 1e-5 * generator.standard_normal(data_KK.shape)


def decaying(seed: int, rate: float = 0.7, channels: int = 20) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rotation_KK = np.linalg.qr(generator.standard_normal((channels, channels)))[0]
    return generator.standard_normal((60, channels)) * rate ** np.arange(channels) @ rotation_KK


DATA = {
    "random": np.random.default_rng(0).standard_normal((50, 24)),
    "decaying": decaying(1),
    "near-singular": decaying(2, rate=0.5),
    "kahan": kahan(16),
    "several kahans": several_kahans(3),
    "graded": np.random.default_rng(4).standard_normal((50, 24)) * 10.0 ** -np.arange(0, 12, 0.5),
    "polynomials": np.linspace(-1, 1, 40)[:, None] ** np.arange(12),
}


@pytest.mark.parametrize("f", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, None])
@pytest.mark.parametrize("name", DATA)
def test_no_swap_grows_the_volume_by_more_than_f_and_the_bounds_hold(name, share, f):
    data_NK = DATA[name]
    channels = data_NK.shape[1]
    keep = channels - 1 if share is None else int(share * channels)
    found = strong_rrqr(data_NK.T @ data_NK, keep, f=f)

    assert found.kept_R.dtype == np.int64 and (np.diff(found.kept_R) > 0).all() and len(found.kept_R) == keep
    # What a Gram matrix can tell apart decides how well rho is known.
    known = 1e-13 * np.linalg.cond(data_NK[:, found.kept_R] / np.linalg.norm(data_NK[:, found.kept_R], axis=0)) ** 2
    assert found.rho <= max(f, 1 + 1e-8)
    assert found.rho == pytest.approx(slow_rho(data_NK, found.kept_R), rel=1e-6 + known, abs=1e-5)

    dropped_T = others(found.kept_R, channels)
    triangle_KK = np.linalg.qr(data_NK[:, np.append(found.kept_R, dropped_T)], mode="r")
    sigma_K, sigma_R, sigma_T = (
        np.linalg.svd(block, compute_uv=False)
        for block in (data_NK, triangle_KK[:keep, :keep], triangle_KK[keep:, keep:])
    )
    q = np.sqrt(1 + max(f, found.rho) ** 2 * keep * (channels - keep)) * (1 + 1e-9)
    assert (sigma_R >= sigma_K[:keep] / q).all() and (sigma_R <= sigma_K[:keep] * (1 + 1e-9)).all()
    assert (sigma_T <= sigma_K[keep:] * q + 1e-14).all()

    floor = 1e-6 * np.linalg.norm(data_NK, axis=0).max()
    assert found.smallest_kept == pytest.approx(sigma_R[-1], rel=1e-6 + known, abs=floor)
    assert found.largest_dropped == pytest.approx(sigma_T[0], rel=1e-6, abs=floor)


@pytest.mark.parametrize("name", DATA)
def test_every_swap_adds_volume_to_that_of_pivoted_qr(name):
    data_NK = DATA[name]
    for keep in range(1, data_NK.shape[1]):
        found = strong_rrqr(data_NK.T @ data_NK, keep)
        pivoted_R = qr(data_NK, mode="r", pivoting=True)[1][:keep]
        if np.linalg.cond(data_NK[:, pivoted_R] / np.linalg.norm(data_NK[:, pivoted_R], axis=0)) < 1e5:
            gain = log_volume(data_NK, found.kept_R) - log_volume(data_NK, pivoted_R)
            assert gain >= found.swaps * np.log(1.5) - 1e-6
            if not found.swaps:
                assert set(found.kept_R) == set(pivoted_R)


@pytest.mark.parametrize("channels", [10, 30, 60])
def test_kahans_matrix_needs_a_swap(channels):
    data_KK = kahan(channels, cosine=0.3)
    found = strong_rrqr(data_KK.T @ data_KK, channels - 1)
    assert found.swaps == 1 and 0 not in found.kept_R
    pivoted_R = np.arange(channels - 1)
    assert np.linalg.svd(data_KK[:, pivoted_R], compute_uv=False)[-1] < found.smallest_kept / 2
    assert found.rho < 1.5 < slow_rho(data_KK, pivoted_R)


def test_pivots_are_those_of_qr_with_column_pivoting():
    for name in ("random", "decaying", "several kahans"):
        data_NK = DATA[name]
        pivots = qr(data_NK, mode="r", pivoting=True)[1]
        for keep in range(1, data_NK.shape[1] + 1):
            tableau = factorise(data_NK.T @ data_NK, keep)
            assert set(tableau.channel_S[:keep]) == set(pivots[:keep])
            assert tableau.log_volume == pytest.approx(log_volume(data_NK, pivots[:keep]), abs=1e-7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), channels=st.integers(2, 14), data=st.data())
def test_every_exchange_equals_a_new_factorisation(seed, channels, data):
    keep = data.draw(st.integers(1, channels - 1))
    generator = np.random.default_rng(seed)
    data_NK = generator.standard_normal((40, channels))
    gram_KK = data_NK.T @ data_NK
    matrix_SS, channel_S, _, volume = factorise(gram_KK, keep)
    matrix_SS = matrix_SS.copy()
    for _ in range(12):
        out, into = generator.integers(keep), generator.integers(keep, channels)
        rho = np.sqrt(matrix_SS[out, into] ** 2 - matrix_SS[out, out] * matrix_SS[into, into])
        exchange(matrix_SS, out, into)
        channel_S[[out, into]] = channel_S[[into, out]]
        np.testing.assert_allclose(matrix_SS, slow_tableau(gram_KK, *np.split(channel_S, [keep])), atol=1e-9, rtol=1e-9)
        volume += np.log(rho)
        assert volume == pytest.approx(log_volume(data_NK, channel_S[:keep]), abs=1e-9)


def test_swaps_exchange_and_do_not_factorise(monkeypatch):
    data_KK = several_kahans(5)
    calls = {"factorise": 0, "exchange": 0}

    def counted(name):
        function = getattr(module, name)

        def call(*arguments):
            calls[name] += 1
            return function(*arguments)

        return call

    for name in calls:
        monkeypatch.setattr(module, name, counted(name))
    found = strong_rrqr(data_KK.T @ data_KK, 16, f=1.1)
    assert found.swaps == calls["exchange"] >= 3
    assert calls["factorise"] == 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), channels=st.integers(1, 12), f=st.floats(1, 4), data=st.data())
def test_promises_hold_for_any_size_and_rank(seed, channels, f, data):
    keep = data.draw(st.integers(1, channels))
    rank = data.draw(st.integers(0, channels))
    generator = np.random.default_rng(seed)
    data_NK = generator.standard_normal((20, rank)) @ generator.standard_normal((rank, channels))
    data_NK *= 10.0 ** generator.uniform(-3, 3, channels)
    gram_KK = data_NK.T @ data_NK
    found = strong_rrqr(gram_KK, keep, f=f)
    assert len(set(found.kept_R.tolist())) == keep
    assert np.isfinite([found.rho, found.smallest_kept, found.largest_dropped]).all()
    if keep <= rank:
        condition = np.linalg.cond(data_NK[:, found.kept_R] / np.linalg.norm(data_NK[:, found.kept_R], axis=0))
        assert condition < 1e4 * channels
        assert slow_rho(data_NK, found.kept_R) <= max(f, 1 + 1e-8) * (1 + 1e-4)
    again = strong_rrqr(gram_KK.copy(), keep, f=f)
    assert np.array_equal(again.kept_R, found.kept_R) and again.rho == found.rho


@pytest.mark.parametrize("name", ["random", "decaying", "several kahans"])
def test_a_permutation_of_the_channels_permutes_the_choice(name):
    data_NK = DATA[name]
    channels = data_NK.shape[1]
    found = strong_rrqr(data_NK.T @ data_NK, channels // 2, f=1.2)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(channels)
        permuted = strong_rrqr(data_NK[:, order].T @ data_NK[:, order], channels // 2, f=1.2)
        assert np.array_equal(np.sort(order[permuted.kept_R]), found.kept_R)
        assert permuted.rho == pytest.approx(found.rho) and permuted.swaps == found.swaps


def test_nothing_depends_on_the_overall_scale():
    data_KK = several_kahans(6)
    found = strong_rrqr(data_KK.T @ data_KK, 16)
    for scale in (1e-12, 1e12):
        scaled = strong_rrqr((scale * data_KK).T @ (scale * data_KK), 16)
        assert np.array_equal(scaled.kept_R, found.kept_R)
        assert scaled.smallest_kept == pytest.approx(scale * found.smallest_kept)
        assert scaled.largest_dropped == pytest.approx(scale * found.largest_dropped)


def test_channels_of_scales_24_orders_apart_are_told_apart():
    generator = np.random.default_rng(7)
    exponents = np.linspace(-12, 12, 24)
    basis_NK = np.linalg.qr(generator.standard_normal((40, 24)))[0]
    order = generator.permutation(24)
    data_NK = (basis_NK * 10.0**exponents)[:, order]
    found = strong_rrqr(data_NK.T @ data_NK, 10)
    assert np.array_equal(found.kept_R, np.sort(np.argsort(-exponents[order])[:10]))
    assert found.smallest_kept == pytest.approx(10.0 ** np.sort(exponents)[-10], rel=1e-3)
    assert found.largest_dropped == pytest.approx(10.0 ** np.sort(exponents)[-11], rel=1e-3)


@pytest.mark.parametrize("f", [1.0, 1.5])
def test_dead_channels(f):
    zero = strong_rrqr(np.zeros((6, 6)), 4, f=f)
    assert zero.kept_R.tolist() == [0, 1, 2, 3] and zero.swaps == 0
    assert (zero.rho, zero.smallest_kept, zero.largest_dropped) == (pytest.approx(1), 0, 0)

    data_NK = np.random.default_rng(8).standard_normal((30, 8))
    data_NK[:, [0, 3, 4, 7]] = 0
    alive = strong_rrqr(data_NK.T @ data_NK, 4, f=f)
    assert alive.kept_R.tolist() == [1, 2, 5, 6]
    assert alive.largest_dropped == 0
    assert alive.smallest_kept == pytest.approx(np.linalg.svd(data_NK, compute_uv=False)[3])
    more = strong_rrqr(data_NK.T @ data_NK, 6, f=f)
    assert more.kept_R.tolist() == [0, 1, 2, 3, 5, 6]
    assert (more.smallest_kept, more.largest_dropped) == (0, 0)


@pytest.mark.parametrize("f", [1.0, 1.5])
def test_of_identical_columns_the_lowest_are_kept(f):
    generator = np.random.default_rng(9)
    distinct_NK = np.rint(8 * generator.standard_normal((30, 6)))
    # Longest last: pivoting takes them in descending order, and must still take the lower twin.
    distinct_NK *= np.arange(1, 7)
    copies = [5, 0, 1, 0, 2, 5, 3, 4, 1, 5]
    data_NK = distinct_NK[:, copies]
    found = strong_rrqr(data_NK.T @ data_NK, 6, f=f)
    assert found.kept_R.tolist() == [0, 1, 2, 4, 6, 7]
    assert found.smallest_kept == pytest.approx(np.linalg.svd(distinct_NK, compute_uv=False)[-1])
    more = strong_rrqr(data_NK.T @ data_NK, 8, f=f)
    assert set(found.kept_R) < set(more.kept_R)
    # Two more twins of three channels; of channel 0's two, never the higher alone.
    assert 9 not in more.kept_R or 5 in more.kept_R
    assert more.smallest_kept < 1e-5 * found.smallest_kept

    same = strong_rrqr(np.ones((7, 7)), 3, f=f)
    assert same.kept_R.tolist() == [0, 1, 2] and np.isfinite(same.rho)


@pytest.mark.parametrize("f", [1.0, 1.5])
def test_swaps_too_end_with_the_lowest_of_identical_columns(f):
    data_NK = np.repeat(several_kahans(14), 2, axis=1)[:, np.random.default_rng(15).permutation(64)]
    found = strong_rrqr(data_NK.T @ data_NK, 16, f=f)
    assert found.swaps
    for channel in found.kept_R:
        assert not any(np.array_equal(data_NK[:, lower], data_NK[:, channel]) for lower in range(channel))


def test_a_higher_twin_that_rounding_preferred_gives_way(monkeypatch):
    data_NK = DATA["random"][:, [0, 0, 1, 1]]

    def unlucky(gram_KK, keep, kept_R=None):
        return factorise(gram_KK, keep, np.array([1, 3]) if kept_R is None else kept_R)

    monkeypatch.setattr(module, "factorise", unlucky)
    assert strong_rrqr(data_NK.T @ data_NK, 2).kept_R.tolist() == [0, 2]


def test_minus_zero_is_zero():
    gram_KK = np.array([[1, 1, -0.0, 0], [1, 1, 0.0, 0], [-0.0, 0, 1, 0], [0, 0, 0, 1]])
    assert [same.tolist() for same in module._twins(gram_KK)] == [[0, 1]]


def test_of_equal_swaps_the_lowest_comes_and_the_highest_goes():
    gram_KK = np.diag([1.0, 1, 1, 4, 4])
    assert module._exchange_until(factorise(gram_KK, 1, np.array([0])), 1.5)[0].tolist() == [3]
    one = factorise(gram_KK[:4, :4], 2, np.array([0, 2]))
    assert sorted(module._exchange_until(one, 1.5)[0]) == [0, 3]


def test_equals_are_not_exchanged_for_ever():
    # Columns evenly around a circle, seen at three frequencies: many choices have the same volume but for rounding.
    angle_K = 2 * np.pi * np.arange(8) / 8 + 0.1
    data_NK = np.vstack([wave(k * angle_K) for k in (1, 2, 3) for wave in (np.cos, np.sin)])
    found = strong_rrqr(data_NK.T @ data_NK, 6, f=1.0)
    assert found.swaps == 0 and found.rho <= 1 + 1e-8


def test_it_ends_where_drift_ate_the_growth(monkeypatch):
    data_KK = kahan(12)
    calls = []

    def drifted(tableau, bound):
        calls.append(bound)
        assert len(calls) < 5
        return tableau.channel_S[: tableau.keep], 1

    monkeypatch.setattr(module, "_exchange_until", drifted)
    found = strong_rrqr(data_KK.T @ data_KK, 11)
    assert len(calls) == 1 and found.swaps == 0
    assert found.rho == pytest.approx(slow_rho(data_KK, found.kept_R), rel=1e-6)


def test_equal_but_different_columns_go_by_the_lower_channel():
    assert strong_rrqr(np.eye(9), 4, f=1.0).kept_R.tolist() == [0, 1, 2, 3]
    # The long channel 3 goes first; a pivoting that moves channels about would then take 4 or 0 by position.
    assert strong_rrqr(np.diag([1.0, 1, 1, 2, 1]), 3).kept_R.tolist() == [0, 1, 3]
    assert strong_rrqr(np.diag([1.0, 1, 4]), 2).kept_R.tolist() == [0, 2]


@pytest.mark.parametrize("f", [1.0, 1.5])
@pytest.mark.parametrize("tokens", [3, 20, 60])
def test_fewer_tokens_than_kept_channels(tokens, f):
    data_NK = np.random.default_rng(tokens).standard_normal((tokens, 64))
    found = strong_rrqr(data_NK.T @ data_NK, 32, f=f)
    assert np.isfinite(found.rho) and found.largest_dropped < 20
    if tokens < 32:
        # The rank is all there among the kept.
        assert np.linalg.matrix_rank(data_NK[:, found.kept_R]) == tokens
        assert found.smallest_kept < 1e-4 and found.largest_dropped < 1e-4


def test_sums_that_were_rounded_to_float32_are_regularised_more():
    data_NK = np.random.default_rng(10).standard_normal((500, 12)) @ np.random.default_rng(11).standard_normal((12, 48))
    gram_KK = (data_NK.astype(np.float32).T @ data_NK.astype(np.float32)).astype(np.float64)
    assert np.linalg.eigvalsh(gram_KK)[0] < 0
    found = strong_rrqr(gram_KK, 24)
    assert found.rho <= 1.5
    assert np.linalg.matrix_rank(data_NK[:, found.kept_R]) == 12


def test_keep_one_and_keep_all():
    data_NK = DATA["random"]
    one = strong_rrqr(data_NK.T @ data_NK, 1)
    assert one.kept_R.tolist() == [np.linalg.norm(data_NK, axis=0).argmax()]
    every = strong_rrqr(data_NK.T @ data_NK, 24)
    assert every.kept_R.tolist() == list(range(24))
    assert (every.rho, every.swaps, every.largest_dropped) == (0, 0, 0)
    assert every.smallest_kept == pytest.approx(np.linalg.svd(data_NK, compute_uv=False)[-1])
    assert strong_rrqr(np.array([[4.0]]), 1).smallest_kept == pytest.approx(2)


def test_the_gram_matrix_is_not_changed():
    data_KK = several_kahans(12)
    gram_KK = data_KK.T @ data_KK
    given_KK = gram_KK.copy()
    assert strong_rrqr(given_KK, 16).swaps
    assert np.array_equal(given_KK, gram_KK)


def test_memory_layout_and_precision_of_the_gram_matrix_do_not_matter():
    data_KK = several_kahans(13).astype(np.float32)
    gram_KK = data_KK.T @ data_KK
    gram_KK = (gram_KK + gram_KK.T) / 2
    found = strong_rrqr(gram_KK.astype(np.float64), 16)
    strided_KK = np.kron(gram_KK.astype(np.float64), np.ones((2, 2)))[::2, ::2]
    for same_KK in (gram_KK, np.asfortranarray(gram_KK), strided_KK):
        other = strong_rrqr(same_KK, 16)
        assert np.array_equal(other.kept_R, found.kept_R) and other.rho == found.rho


@pytest.mark.parametrize("f", [0.99, 0, -2, float("nan")])
def test_f_below_one_is_refused(f):
    with pytest.raises(KeyreduceError, match=rf"`f` is {f}; it is at least 1"):
        strong_rrqr(np.eye(4), 2, f=f)


@pytest.mark.parametrize("keep", [0, 5])
def test_keep_is_from_one_to_all(keep):
    with pytest.raises(ValueError, match=f"keep is {keep} of 4 channels"):
        strong_rrqr(np.eye(4), keep)

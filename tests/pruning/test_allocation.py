"""Budgets from calibration sums, against every way to share out a few channels."""

import itertools

import numpy as np
import pytest
import torch
from cuts import layer_statistics

from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.pruning.allocation import by_energy, by_variance
from keyreduce.pruning.methods import METHODS

PCA = METHODS["pca"]


def sums_of(*ranks: int, heads: int = 2, seed: int = 0):
    """Sums of layers whose key heads have so many channels."""
    return {
        layer: layer_statistics(MixerSizes(heads, heads, rank, 3), 4, seed=10 * seed + layer)
        for layer, rank in enumerate(ranks)
    }


def worth(sums, kept: int) -> float:
    """The share of a layer's energy that its best channels have, each head choosing its own."""
    shares = []
    for query_KK, key_KK in zip(sums.query_gram_HKK, sums.key_gram_HKK, strict=True):
        energies = sorted((float(query_KK[c, c] + key_KK[c, c]) for c in range(len(query_KK))), reverse=True)
        shares.append(sum(energies[:kept]) / sum(energies))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("multiple_of", "seed"), list(itertools.product([1, 2, 3], range(4))))
def test_no_other_way_keeps_more_energy(multiple_of, seed):
    layers = sums_of(6, 5, 7, seed=seed)
    keep = {0: 3, 1: 3, 2: 6} if multiple_of == 3 else {0: 4, 1: 2, 2: 4}
    given = by_energy(layers, keep, multiple_of)
    assert sum(given.values()) == sum(keep.values())
    assert all(number % multiple_of == 0 for number in given.values())
    possible = [range(multiple_of, rank + 1, multiple_of) for rank in (6, 5, 7)]
    best = max(
        sum(worth(layers[layer], number) for layer, number in enumerate(numbers))
        for numbers in itertools.product(*possible)
        if sum(numbers) == sum(keep.values())
    )
    assert sum(worth(layers[layer], number) for layer, number in given.items()) == pytest.approx(best)


def test_energy_goes_where_it_is():
    layers = sums_of(8, 8)
    for name in ("query_gram_HKK", "key_gram_HKK"):
        getattr(layers[0], name).copy_(torch.diag(torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])))
        getattr(layers[1], name).copy_(torch.eye(8))
    assert by_energy(layers, {0: 4, 1: 4}) == {0: 1, 1: 7}
    # The energy of one layer says nothing of that of another.
    layers[0].query_gram_HKK *= 1000
    assert by_energy(layers, {0: 4, 1: 4}) == {0: 1, 1: 7}


def test_alike_layers_share_alike_and_the_lower_comes_first():
    layers = dict.fromkeys(range(3), sums_of(8)[0])
    assert by_energy(layers, dict.fromkeys(range(3), 5)) == {0: 5, 1: 5, 2: 5}
    assert by_energy(layers, {0: 3, 1: 3, 2: 1}) == {0: 3, 1: 2, 2: 2}
    assert by_energy(layers, dict.fromkeys(range(3), 8)) == {0: 8, 1: 8, 2: 8}


def test_dead_heads_have_no_say():
    layers = sums_of(8, 8, heads=3)
    alive = by_energy({layer: with_heads(sums, [0, 2]) for layer, sums in layers.items()}, {0: 4, 1: 4})
    for sums in layers.values():
        sums.query_gram_HKK[1] = sums.key_gram_HKK[1] = 0
    assert by_energy(layers, {0: 4, 1: 4}) == alive
    layers[0].query_gram_HKK.zero_()
    layers[0].key_gram_HKK.zero_()
    assert by_energy(layers, {0: 4, 1: 4}) == {0: 1, 1: 7}


def with_heads(sums, heads: list[int]):
    kept = layer_statistics(MixerSizes(len(heads), len(heads), 8, 3), 4)
    for name in ("query_gram_HKK", "key_gram_HKK", "unit_query_gram_HKK", "unit_key_gram_HKK"):
        getattr(kept, name).copy_(getattr(sums, name)[heads])
    return kept


def share_kept(sums, rank: int, include_queries: bool) -> float:
    shares = []
    for query_KK, key_KK in zip(sums.unit_query_gram_HKK.numpy(), sums.unit_key_gram_HKK.numpy(), strict=True):
        values = np.linalg.eigvalsh(key_KK + query_KK if include_queries else key_KK)[::-1]
        shares.append(values[:rank].sum() / values.sum())
    return float(np.mean(shares))


@pytest.mark.parametrize("include_queries", [False, True])
@pytest.mark.parametrize("variance", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_the_smallest_rank_that_keeps_the_variance(variance, include_queries):
    layers = sums_of(9, 7)
    ranks = by_variance(FAMILIES["delta_net_2"], layers, variance, PCA, {"include_queries": include_queries})
    for layer, rank in ranks.items():
        assert share_kept(layers[layer], rank, include_queries) >= variance - 1e-9
        assert rank == 1 or share_kept(layers[layer], rank - 1, include_queries) < variance
    both = sums_of(9, 9)
    ranks = by_variance(FAMILIES["gated_deltanet"], both, variance, PCA, {"include_queries": include_queries})
    (rank,) = set(ranks.values())

    def mean_share(rank: int) -> float:
        return np.mean([share_kept(sums, rank, include_queries) for sums in both.values()])

    assert mean_share(rank) >= variance - 1e-9
    assert rank == 1 or mean_share(rank - 1) < variance


def test_variance_is_of_the_ranks_that_there_are():
    layers = sums_of(8)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    layers[0].unit_key_gram_HKK.copy_(basis @ torch.diag(torch.tensor([4.0, 3, 2, 1, 0, 0, 0, 0]).double()) @ basis.T)

    def ranks(variance: float, multiple_of: int = 1) -> dict:
        options = {"include_queries": False}
        return by_variance(FAMILIES["delta_net"], layers, variance, PCA, options, multiple_of=multiple_of)

    assert [ranks(variance)[0] for variance in (0.1, 0.4, 0.41, 0.7, 0.71, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3, 4, 4]
    # Rounded up, but to no more than there is.
    assert [ranks(0.95, multiple_of)[0] for multiple_of in (2, 3, 5, 8)] == [4, 6, 5, 8]


@pytest.mark.parametrize("model_type", ["delta_net", "delta_net_2"])
def test_dead_heads_have_no_variance_to_keep(model_type):
    layers = sums_of(8, 8, heads=3)
    alive = {layer: with_heads(sums, [0, 2]) for layer, sums in layers.items()}
    expected = by_variance(FAMILIES[model_type], alive, 0.9, PCA, {"include_queries": False})
    for sums in layers.values():
        sums.unit_key_gram_HKK[1] = 0
    assert by_variance(FAMILIES[model_type], layers, 0.9, PCA, {"include_queries": False}) == expected
    layers[0].unit_key_gram_HKK.zero_()
    ranks = by_variance(FAMILIES[model_type], layers, 0.9, PCA, {"include_queries": False})
    assert ranks[1] == by_variance(FAMILIES["delta_net_2"], {1: layers[1]}, 0.9, PCA, {"include_queries": False})[1]
    assert ranks[0] == (1 if model_type == "delta_net_2" else ranks[1])

"""The predicted cost of a cut, against least squares of rows whose Gram matrices the statistics are.

Shapes: H key heads, W value heads, K key channels, V value channels, D hidden, N rows.
"""

import dataclasses
import math

import hybrid_models
import numpy as np
import pytest
import torch
from cuts import build, layer_statistics, statistics_of, store

from keyreduce.checkpoint.folder import open_folder
from keyreduce.families import MixerSizes, family_of
from keyreduce.pruning.prediction import KEY_WEIGHT, curves_of, predicted_loss, read_curves

SIZES = MixerSizes(key_heads=3, value_heads=6, head_k_dim=4, head_v_dim=5)
HIDDEN, ROWS = 8, 40


@pytest.fixture(scope="module")
def known():
    """Rows of the output projection's input ``[W, N, V]``, its weight ``[W, V, D]``, and the statistics."""
    drawn = np.random.default_rng(3)
    rows_WNV = drawn.standard_normal((6, ROWS, 5)) @ drawn.standard_normal((6, 5, 5))
    rows_WNV *= drawn.uniform(0.2, 2, (6, 1, 5))
    weight_WVD = drawn.standard_normal((6, 5, HIDDEN))
    gram_WVV = torch.from_numpy(rows_WNV.transpose(0, 2, 1) @ rows_WNV)
    statistics = dataclasses.replace(layer_statistics(SIZES, HIDDEN), output_gram_WVV=gram_WVV)
    return rows_WNV, weight_WVD, statistics


@pytest.fixture(scope="module")
def curves(known):
    _, weight_WVD, statistics = known
    return curves_of(statistics, SIZES, torch.from_numpy(weight_WVD))


def energies_of(rows_WNV, weight_WVD) -> np.ndarray:
    """The squares of what each key head's value heads add to the output, each value head by itself."""
    of_value_heads = [np.square(rows @ weight).sum() for rows, weight in zip(rows_WNV, weight_WVD, strict=True)]
    return np.array(of_value_heads).reshape(3, 2).sum(1)


def test_heads_come_by_their_energy(known, curves):
    energy_H = energies_of(*known[:2])
    np.testing.assert_allclose(curves.energy_H, sorted(energy_H / energy_H.sum(), reverse=True), rtol=1e-9)


def test_the_value_curve_is_the_residual_of_least_squares(known, curves):
    """Of each value head's output on its first channels by energy, for every number of them."""
    rows_WNV, weight_WVD, _ = known
    energy_H = energies_of(rows_WNV, weight_WVD)
    for place, head in enumerate(np.argsort(-energy_H)):
        for number in range(1, 6):
            residual = 0.0
            for one in (2 * head, 2 * head + 1):
                order_V = np.argsort(-np.square(rows_WNV[one]).sum(0))
                kept_NR, output_ND = rows_WNV[one][:, order_V[:number]], rows_WNV[one] @ weight_WVD[one]
                fitted_RD = np.linalg.lstsq(kept_NR, output_ND, rcond=None)[0]
                residual += np.square(output_ND - kept_NR @ fitted_RD).sum()
            expected = residual / energy_H[head]
            assert float(curves.value_HV[place, number - 1]) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_value_curve_is_the_trace_of_the_schur_complement(known, curves):
    """The same from the Gram matrix, as the optimal brain surgeon has it, of the last value head alone."""
    _, weight_WVD, statistics = known
    one = dataclasses.replace(statistics, output_gram_WVV=statistics.output_gram_WVV[-1:])
    found = curves_of(one, SIZES._replace(key_heads=1, value_heads=1), torch.from_numpy(weight_WVD[-1:]))
    gram_VV = statistics.output_gram_WVV[-1].numpy()
    order_V = np.argsort(-np.diag(gram_VV))
    gram_VV, weight_VD = gram_VV[np.ix_(order_V, order_V)], weight_WVD[-1][order_V]
    whole = np.trace(weight_VD.T @ gram_VV @ weight_VD)
    for number in range(1, 5):
        head, cross, tail = gram_VV[:number, :number], gram_VV[:number, number:], gram_VV[number:, number:]
        schur = tail - cross.T @ np.linalg.solve(head, cross)
        expected = np.trace(weight_VD[number:].T @ schur @ weight_VD[number:]) / whole
        assert float(found.value_HV[0, number - 1]) == pytest.approx(expected, rel=1e-5)


def test_the_key_curve_is_the_logarithm_of_the_share_that_stays(known, curves):
    rows_WNV, weight_WVD, statistics = known
    for place, head in enumerate(np.argsort(-energies_of(rows_WNV, weight_WVD))):
        raw_K = sum(np.diag(gram[head]) for gram in (statistics.query_gram_HKK, statistics.key_gram_HKK))
        unit_K = np.diag(statistics.unit_key_gram_HKK[head])[np.argsort(-raw_K)]
        for number in range(1, 5):
            expected = -math.log(unit_K[:number].sum() / unit_K.sum())
            assert float(curves.key_HK[place, number - 1]) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("recovery", KEY_WEIGHT)
def test_the_score_is_the_sum_that_is_written(known, curves, recovery):
    """Of two of three heads with 3 of 4 key and 2 of 5 value channels, the mean over two layers, one of them whole."""
    energy_H = curves.energy_H.numpy()
    parts = [
        energy_H[head] * (KEY_WEIGHT[recovery] * curves.key_HK[head, 2] + curves.value_HV[head, 1]) for head in (0, 1)
    ]
    expected = float(sum(parts)) + energy_H[2]
    sizes = MixerSizes(2, 4, 3, 2)
    assert predicted_loss({0: curves}, sizes, recovery) == pytest.approx(expected, rel=1e-12)
    other = curves_of(layer_statistics(SIZES, HIDDEN, seed=9), SIZES, torch.randn(6, 5, HIDDEN, dtype=torch.float64))
    both = [predicted_loss({0: one}, sizes, recovery) for one in (curves, other)]
    assert predicted_loss({0: curves, 5: other}, sizes, recovery) == pytest.approx(sum(both) / 2, rel=1e-12)


def test_the_whole_costs_nothing_and_less_never_costs_less(curves):
    assert predicted_loss({0: curves}, SIZES) == pytest.approx(0, abs=1e-6)
    grid = {
        (heads, key, value): predicted_loss({0: curves}, MixerSizes(heads, 2 * heads, key, value))
        for heads in range(1, 4)
        for key in range(1, 5)
        for value in range(1, 6)
    }
    for (heads, key, value), score in grid.items():
        if heads == 3:  # with a head that goes, what its channels would cost goes too
            for larger in ((3, key + 1, value), (3, key, value + 1)):
                assert larger not in grid or grid[larger] <= score
    assert grid[2, 4, 5] == pytest.approx(float(curves.energy_H[2]))


def test_channels_and_heads_without_energy_are_no_error():
    zeros = {name: torch.zeros_like(tensor) for name, tensor in layer_statistics(SIZES, HIDDEN).tensors().items()}
    zeros = {name: tensor for name, tensor in zeros.items() if not name.startswith("taylor")}
    empty = dataclasses.replace(layer_statistics(SIZES, HIDDEN), **zeros)
    found = curves_of(empty, SIZES, torch.ones(6, 5, HIDDEN))
    assert all(torch.isfinite(curve).all() for curve in found)
    one = torch.zeros(6, 5, 5, dtype=torch.float64)
    one[:, 1, 1] = 1
    found = curves_of(dataclasses.replace(empty, output_gram_WVV=one), SIZES, torch.ones(6, 5, HIDDEN))
    assert float(found.value_HV.max()) < 1e-6  # the first channel by energy gives all


@pytest.mark.parametrize("model_type", ["gated_deltanet", "qwen3_next"])
def test_weights_are_read_from_the_checkpoint(tmp_path, model_type):
    if model_type == "qwen3_next":
        source = open_folder(hybrid_models.store(hybrid_models.build(model_type), tmp_path / "dense"))
        name = "model.layers.2.linear_attn.out_proj.weight"
    else:
        source = store(build(model_type, {"num_v_heads": 4}).float(), tmp_path / "dense")
        name = "model.layers.1.attn.o_proj.weight"
    statistics = statistics_of(source)
    layers = read_curves(source, statistics)
    sizes = family_of(source.config).layer_sizes(source.config)
    assert layers.keys() == sizes.keys()
    last = max(sizes)
    weight_WVD = source.read(name).T.unflatten(0, (sizes[last].value_heads, -1))
    expected = curves_of(statistics.layers[last], sizes[last], weight_WVD)
    for found, wanted in zip(layers[last], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)

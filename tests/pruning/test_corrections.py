"""The corrections of a cut, against numpy's least squares and sums written out, and in the models that they change.

Shapes: H key heads, W value heads, K key channels, V value channels, D hidden, R kept, N rows.
"""

import dataclasses
import math

import hybrid_models
import numpy as np
import pytest
import torch
from cuts import build, cut, layer_statistics, load, statistics_of, store
from tiny_models import draw_tokens, tensors_of

from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.families import MixerSizes, family_of
from keyreduce.pruning.corrections import RIDGE, correction_of, key_share
from keyreduce.pruning.masked import compare_logits
from keyreduce.pruning.methods import METHODS
from keyreduce.pruning.plan import LayerCut, Plan
from keyreduce.pruning.planning import make_plan

CPU = torch.device("cpu")
BEFORE = MixerSizes(key_heads=3, value_heads=6, head_k_dim=4, head_v_dim=5)
HEADS, KEYS, VALUES = [0, 2], [[0, 3], [1, 2]], [[0, 2, 4], [1, 2, 3], [0, 1, 2], [2, 3, 4]]
VALUE_HEADS = [0, 1, 4, 5]
CUT = LayerCut(
    before=BEFORE,
    after=MixerSizes(2, 4, 2, 3),
    heads_H=torch.tensor(HEADS),
    key_HR=torch.tensor(KEYS),
    value_WR=torch.tensor(VALUES),
)
HIDDEN, TOKENS = 7, 30

pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


@pytest.fixture
def statistics():
    found = layer_statistics(BEFORE, HIDDEN, tokens=TOKENS)
    return dataclasses.replace(found, beta_W=TOKENS * torch.tensor([0.1, 0.9, 0.5, 0.5, 0.3, 0.7], dtype=torch.float64))


@pytest.mark.parametrize("largest", [1.0, 2.0])
def test_factors_and_shifts_are_those_of_the_shares(statistics, largest):
    found = correction_of(CUT, statistics, TOKENS, largest)
    squares_WV, grams_HKK = statistics.readout_square_WV.numpy(), statistics.unit_key_gram_HKK.numpy()
    for place, (head, kept) in enumerate(zip(VALUE_HEADS, VALUES, strict=True)):
        share = sum(squares_WV[head, channel] for channel in kept) / sum(squares_WV[head])
        assert float(found.value_scale_W[place]) == pytest.approx(math.sqrt(share), rel=1e-12)
        squares_K = np.diag(grams_HKK[HEADS[place // 2]])
        key = sum(squares_K[channel] for channel in KEYS[place // 2]) / sum(squares_K)
        mean = float(statistics.beta_W[head]) / TOKENS / largest
        shift = math.log(mean * key / (1 - mean * key)) - math.log(mean / (1 - mean))
        assert float(found.beta_shift_W[place]) == pytest.approx(shift, rel=1e-10)
        # So the strength that the mean token has becomes that share of what it was.
        after = largest / (1 + math.exp(-(math.log(mean / (1 - mean)) + shift)))
        assert after == pytest.approx(key * largest * mean, rel=1e-10)
    assert torch.equal(found.constant_D, statistics.constant_D)


def test_columns_are_the_ridge_regression_of_what_goes_on_what_stays():
    """Of rows whose Gram matrix is the statistic: solved here by least squares with the ridge as further rows."""
    rows_WNV = np.random.default_rng(0).standard_normal((6, TOKENS, 5)) * [1, 2, 3, 0.5, 1]
    rows_WNV[..., 0] += rows_WNV[..., 1]  # something to be had from the others
    gram_WVV = torch.from_numpy(rows_WNV.transpose(0, 2, 1) @ rows_WNV)
    known = dataclasses.replace(layer_statistics(BEFORE, HIDDEN), output_gram_WVV=gram_WVV)
    found_WVR = correction_of(CUT, known, TOKENS, 1.0).columns_WVR
    assert found_WVR.dtype == torch.float32
    for place, (head, kept) in enumerate(zip(VALUE_HEADS, VALUES, strict=True)):
        rows_NV, kept_NR = rows_WNV[head], rows_WNV[head][:, kept]
        ridge = RIDGE * np.mean(np.square(kept_NR).sum(0))
        expected_VR = np.zeros((5, 3))
        expected_VR[kept, range(3)] = 1
        for channel in set(range(5)) - {*kept}:
            wide_MR = np.concatenate([kept_NR, ridge**0.5 * np.eye(3)])
            wanted_M = np.concatenate([rows_NV[:, channel], np.zeros(3)])
            expected_VR[channel] = np.linalg.lstsq(wide_MR, wanted_M, rcond=None)[0]
        np.testing.assert_allclose(found_WVR[place], expected_VR, rtol=1e-5, atol=1e-6)


def test_a_projection_keeps_the_share_of_its_directions(statistics):
    basis_HKR = torch.linalg.qr(torch.randn(2, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    projected = dataclasses.replace(CUT, key_HR=None, projection_HKR=basis_HKR)
    for place, head in enumerate(HEADS):
        gram_KK = statistics.unit_key_gram_HKK[head].numpy()
        basis_KR = basis_HKR[place].numpy()
        expected = np.trace(basis_KR.T @ gram_KK @ basis_KR) / np.trace(gram_KK)
        assert float(key_share(projected, statistics)[place]) == pytest.approx(expected, rel=1e-12)


def test_a_head_without_any_energy_is_left_as_it_is(statistics):
    zeros = {name: torch.zeros_like(getattr(statistics, name)) for name in vars(statistics) if "gram" in name}
    zeros["readout_square_WV"] = torch.zeros_like(statistics.readout_square_WV)
    found = correction_of(CUT, dataclasses.replace(statistics, **zeros), TOKENS, 1.0)
    assert torch.equal(found.value_scale_W, torch.ones(4).double())
    assert not found.beta_shift_W.any()
    expected_VR = torch.zeros(5, 3)
    expected_VR[VALUES[0], range(3)] = 1
    assert torch.equal(found.columns_WVR[0], expected_VR)


def corrected_plan(source: Checkpoint, numbers: dict[str, int], *, correct: bool = True, method: str = "l2") -> Plan:
    layers = family_of(source.config).layer_sizes(source.config)
    keep = {target: dict.fromkeys(layers, number) for target, number in numbers.items()}
    inputs = {"source": source.identity, "method": method, "targets": list(keep)}
    options = dict(seed=0, statistics=statistics_of(source), inputs=inputs, correct=correct)
    return make_plan(source, METHODS[method], keep, **options)


OWN = {
    "delta_net": ("delta_net", {"use_gate": True}),
    "delta_net without strength": ("delta_net", {"use_beta": False}),
    "delta_net_2 doubled": ("delta_net_2", {"allow_neg_eigval": True}),
    "gated_deltanet": ("gated_deltanet", {"num_v_heads": 8, "head_dim": 8}),
}


def checked(source: Checkpoint, numbers: dict[str, int], folder) -> float:
    """The difference from the masked dense model; the correction is there and changes the logits."""
    plan = corrected_plan(source, numbers)
    assert all(one.correction is not None for one in plan.layers.values())
    made = cut(source, plan, folder / "cut")
    plain = cut(source, corrected_plan(source, numbers, correct=False), folder / "plain")
    before, after = tensors_of(plain), tensors_of(made)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    return compare_logits(source, made, plan, device=CPU, tokens=(20,))


NUMBERS = [{"key": 5}, {"value": 5}, {"key": 5, "value": 4, "head": 2}]
# A strength that is always 1 has no weights to correct.
CHANGED = [(name, numbers) for name in OWN for numbers in NUMBERS if "without" not in name or "value" in numbers]


@pytest.mark.parametrize(("name", "numbers"), CHANGED)
def test_a_corrected_cut_is_the_masked_model_with_the_same_corrections(tmp_path, name, numbers):
    model_type, config = OWN[name]
    source = store(build(model_type, {"num_heads": 4, "initializer_range": 0.1} | config).float(), tmp_path / "dense")
    assert checked(source, numbers, tmp_path) < 1e-4


@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_text", "olmo_hybrid", "kda"])
def test_so_for_other_families(tmp_path, model_type):
    """Qwen3-Next's weight of the strength is packed with that of the decay; KDA's key channels decay each alone."""
    source = open_folder(hybrid_models.store(hybrid_models.build(model_type), tmp_path / "dense"))
    numbers = {"key": 5, "head": 1} if model_type == "kda" else {"key": 5, "value": 4, "head": 1}
    assert checked(source, numbers, tmp_path) < 1e-4


@torch.no_grad()
def test_the_packed_strength_of_qwen3_next_is_shifted_and_its_decay_is_not(tmp_path):
    """Rows of ``in_proj_ba``: for each of two key heads two strengths, then two decays."""
    source = open_folder(hybrid_models.store(hybrid_models.build("qwen3_next"), tmp_path / "dense"))
    plan = corrected_plan(source, {"key": 4})
    name = "model.layers.2.linear_attn.in_proj_ba.weight"
    before, after = source.read(name), tensors_of(cut(source, plan, tmp_path / "cut"))[name]
    correction = plan.layers[2].correction
    for row, value_head in {0: 0, 1: 1, 4: 2, 5: 3}.items():
        expected_D = before[row].double() + correction.beta_shift_W[value_head] * correction.constant_D
        torch.testing.assert_close(after[row].double(), expected_D, rtol=1e-5, atol=1e-6)
    for row in (2, 3, 6, 7):
        assert torch.equal(after[row], before[row])


@torch.no_grad()
def test_only_the_strength_and_the_output_differ_from_an_exact_cut(tmp_path):
    source = store(build("delta_net", {"num_heads": 4}), tmp_path / "dense")
    numbers = {"key": 5, "value": 5, "head": 3}
    exact = tensors_of(cut(source, corrected_plan(source, numbers, correct=False), tmp_path / "exact"))
    corrected = tensors_of(cut(source, corrected_plan(source, numbers), tmp_path / "corrected"))
    different = {name.partition(".attn.")[2] for name in exact if not torch.equal(exact[name], corrected[name])}
    assert different == {"b_proj.weight", "o_proj.weight"}


def test_the_output_projection_by_hand(tmp_path):
    """What is kept of a head: its columns, and what the others give to them, times the factor."""
    source = store(build("delta_net", {}), tmp_path / "dense")
    plan = corrected_plan(source, {"value": 5})
    one, name = plan.layers[1], "model.layers.1.attn.o_proj.weight"
    weight_DWV = source.read(name).double().unflatten(1, (one.before.value_heads, -1))
    norm_V = source.read("model.layers.1.attn.o_norm.weight").double()
    expected_DWR = torch.stack(
        [
            (weight_DWV[:, head] @ one.correction.columns_WVR[head].double())
            * norm_V[one.value_WR[head]]
            * (one.before.head_v_dim / 5) ** 0.5
            * one.correction.value_scale_W[head]
            for head in range(one.before.value_heads)
        ],
        dim=1,
    )
    after_DC = tensors_of(cut(source, plan, tmp_path / "cut"))[name]
    torch.testing.assert_close(after_DC.double(), expected_DWR.flatten(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
def test_keeping_all_corrects_nothing(tmp_path, model_type):
    source = store(build(model_type, {}).float(), tmp_path / "dense")
    sizes = family_of(source.config).sizes(source.config)
    plan = corrected_plan(source, {"key": sizes.head_k_dim, "value": sizes.head_v_dim, "head": sizes.key_heads})
    assert all(one.correction is None for one in plan.layers.values())
    before, after = tensors_of(source.path), tensors_of(cut(source, plan, tmp_path / "cut"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_without_statistics_nothing_is_corrected(tmp_path):
    source = store(build("delta_net", {}).float(), tmp_path / "dense")
    keep = {"key": dict.fromkeys(range(2), 5)}
    plan = make_plan(source, METHODS["l2"], keep, seed=0, statistics=None, inputs={}, correct=True)
    assert all(one.correction is None and "correction" not in one.to_json() for one in plan.layers.values())


@torch.no_grad()
def test_the_correction_of_values_brings_the_output_back():
    """One head whose channels are alike: half of them, enlarged and doubled, would give twice the output."""
    rows_NV = torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).expand(-1, 4)
    sizes = MixerSizes(1, 1, 2, 4)
    known = dataclasses.replace(
        layer_statistics(sizes, HIDDEN),
        output_gram_WVV=(rows_NV.T @ rows_NV)[None],
        readout_square_WV=torch.full((1, 4), 200.0, dtype=torch.float64),
    )
    half = LayerCut(sizes, MixerSizes(1, 1, 2, 2), *map(torch.tensor, ([0], [[0, 1]], [[0, 1]])))
    found = correction_of(half, known, 200, 1.0)
    weight_V = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    columns_R = weight_V @ found.columns_WVR[0].double() * found.value_scale_W[0]
    # What stays comes out sqrt(2) times as large, since it holds half of the squares.
    output_N, expected_N = 2**0.5 * rows_NV[:, :2] @ columns_R, rows_NV @ weight_V
    assert float((output_N - expected_N).norm() / expected_N.norm()) < 0.05  # what the ridge takes


@torch.no_grad()
def test_generation_is_prefill_after_a_correction(tmp_path):
    source, tokens = store(build("gated_deltanet", {}).float(), tmp_path / "dense"), draw_tokens(2, 12)
    model = load(cut(source, corrected_plan(source, {"key": 4, "value": 6}), tmp_path / "cut"), torch.float32)
    result = model(tokens[:, :8], use_cache=True)
    logits = [result.logits]
    for step in range(8, 12):
        result = model(tokens[:, step : step + 1], past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens, use_cache=False).logits, rtol=1e-3, atol=1e-3)

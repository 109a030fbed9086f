"""The sums of a calibration against the same sums from the model's weights, in float64 and without its operators.

Shapes: B rows, T tokens, N = B * T, D hidden, H key heads, K key channels, W value heads, V value channels.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import FAMILIES as MODELS
from tiny_models import build, draw_tokens

from keyreduce.calibration.capture import collect, watching
from keyreduce.calibration.statistics import LayerStatistics
from keyreduce.families import FAMILIES, MixerSizes
from keyreduce.models.loading import LoadedModel

VARIANTS = {
    "delta_net": ("delta_net", {}),
    "delta_net without convolution": ("delta_net", {"use_short_conv": False}),
    "delta_net relu": ("delta_net", {"qk_activation": "relu"}),
    "delta_net narrow keys": ("delta_net", {"expand_k": 0.5, "use_gate": True}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet without gate": ("gated_deltanet", {"use_gate": False}),
    "gated_deltanet without convolution": ("gated_deltanet", {"use_short_conv": False}),
    "gated_deltanet doubled strength": ("gated_deltanet", {"allow_neg_eigval": True}),
}

pytestmark = pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")


def loaded(model: torch.nn.Module) -> LoadedModel:
    return LoadedModel(model, None, FAMILIES[model.config.model_type], Path("tiny"))


def operands(mixer: torch.nn.Module, which: str, input_BTD: torch.Tensor, channels: int) -> torch.Tensor:
    """q, k or v from the weights: projection, causal depthwise convolution, activation; ``[B, T, H, K]``."""
    channels_BTC = input_BTD @ getattr(mixer, f"{which}_proj").weight.double().T
    if mixer.use_short_conv:
        weight_C1W = getattr(mixer, f"{which}_conv1d").weight.double()
        padded = F.pad(channels_BTC.transpose(1, 2), (weight_C1W.shape[-1] - 1, 0))
        channels_BTC = F.conv1d(padded, weight_C1W, groups=len(weight_C1W)).transpose(1, 2)
    is_relu = which != "v" and getattr(mixer, "qk_activation", "silu") == "relu"
    return (torch.relu if is_relu else F.silu)(channels_BTC).unflatten(-1, (-1, channels))


def outer_products(vectors_NHK: torch.Tensor) -> torch.Tensor:
    return sum(torch.stack([torch.outer(vector_K, vector_K) for vector_K in row_HK]) for row_HK in vectors_NHK)


def readout_sums(mixer: torch.nn.Module, input_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    """What comes of the operator's output and states, which the delta rule gives here token by token."""
    query_BTHK, key_BTHK = (operands(mixer, which, input_BTD, mixer.head_k_dim) for which in "qk")
    value_BTWV = operands(mixer, "v", input_BTD, mixer.head_v_dim)
    beta_BTW = torch.sigmoid(input_BTD @ mixer.b_proj.weight.double().T) * (2 if mixer.allow_neg_eigval else 1)
    decay_BTW = torch.ones_like(beta_BTW)
    if hasattr(mixer, "A_log"):
        step_BTW = F.softplus(input_BTD @ mixer.a_proj.weight.double().T + mixer.dt_bias.double())
        decay_BTW = torch.exp(-mixer.A_log.double().exp() * step_BTW)
    group = value_BTWV.shape[2] // key_BTHK.shape[2]
    sums = {"readout_square_WV": torch.zeros_like(value_BTWV[0, 0]), "beta_W": beta_BTW.sum((0, 1))}
    sums |= {name: torch.zeros_like(beta_BTW[0, 0]) for name in ("state_rank_W", "state_norm_W")}
    for row, head in np.ndindex(len(value_BTWV), value_BTWV.shape[2]):
        state_KV = torch.zeros(key_BTHK.shape[-1], value_BTWV.shape[-1], dtype=torch.float64)
        for token in range(value_BTWV.shape[1]):
            query_K, key_K = (
                one[row, token, head // group] / (one[row, token, head // group].square().sum() + 1e-6).sqrt()
                for one in (query_BTHK, key_BTHK)
            )
            state_KV = state_KV * decay_BTW[row, token, head]
            new_V = beta_BTW[row, token, head] * (value_BTWV[row, token, head] - key_K @ state_KV)
            state_KV = state_KV + torch.outer(key_K, new_V)
            square_V = (query_K @ state_KV).square()
            sums["readout_square_WV"][head] += square_V / square_V.mean()
        singular_M = np.linalg.svd(state_KV.numpy(), compute_uv=False)
        sums["state_rank_W"][head] += (singular_M**2).sum() / singular_M[0] ** 2
        sums["state_norm_W"][head] += (singular_M**2).sum() ** 0.5
    return sums


def expected_sums(model: torch.nn.Module, tokens_BT: torch.Tensor, layer: int) -> dict[str, torch.Tensor]:
    """The sums, token by token, from the hidden states that transformers gives out; and the mixer's input."""
    block, before_output = model.model.layers[layer], []
    hook = block.attn.o_proj.register_forward_hook(lambda module, args, result: before_output.append(args[0]))
    hidden_BTD = model.model(tokens_BT, output_hidden_states=True, use_cache=False).hidden_states[layer]
    hook.remove()
    scale = torch.rsqrt(hidden_BTD.square().mean(-1, keepdim=True) + model.config.norm_eps)
    input_BTD = hidden_BTD * scale * block.attn_norm.weight.double()
    head_k_dim = block.attn.head_k_dim
    sums = {"input_square_D": sum(row_D**2 for row_D in input_BTD.flatten(0, 1))} | readout_sums(block.attn, input_BTD)
    for kind in ("query", "key"):
        rows_NHK = operands(block.attn, kind[0], input_BTD, head_k_dim).flatten(0, 1)
        unit_NHK = torch.stack([row_HK / (row_HK.square().sum(-1, keepdim=True) + 1e-6).sqrt() for row_HK in rows_NHK])
        for prefix, vectors_NHK in ((kind, rows_NHK), (f"unit_{kind}", unit_NHK)):
            sums[f"{prefix}_gram_HKK"] = outer_products(vectors_NHK)
    head_v_dim = block.attn.head_v_dim
    output_NWV = before_output[0].flatten(0, 1).unflatten(-1, (-1, head_v_dim))
    sums["output_gram_WVV"] = outer_products(output_NWV)
    energies = []
    for head in range(output_NWV.shape[1]):
        alone_NWV = torch.zeros_like(output_NWV)
        alone_NWV[:, head] = output_NWV[:, head]
        energies.append(block.attn.o_proj(alone_NWV.flatten(1)).square().sum())
    sums["output_energy_W"] = torch.stack(energies)
    return sums | {"input_ND": input_BTD.flatten(0, 1)}


def constant_direction(input_ND: torch.Tensor) -> torch.Tensor:
    """u that makes the mean of ``(u x - 1)^2`` small, with a hundredth of the mean square of x as ridge."""
    ridge = 1e-2 * float(input_ND.square().sum(0).mean())
    rows_MD = np.concatenate([input_ND.numpy(), ridge**0.5 * np.eye(input_ND.shape[1])])
    wanted_M = np.concatenate([np.ones(len(input_ND)), np.zeros(input_ND.shape[1])])
    return torch.from_numpy(np.linalg.lstsq(rows_MD, wanted_M, rcond=None)[0])


# Rows of up to 64 tokens take the recurrent operator, longer ones the chunked one.
@pytest.mark.parametrize("seq_len", [9, 70])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_sums_are_those_of_a_plain_float64_computation(variant, seq_len):
    model_type, changes = VARIANTS[variant]
    model = build(model_type, **changes).double()
    batches = [draw_tokens(2, seq_len), draw_tokens(1, seq_len, seed=1)]
    layers, tokens = collect(loaded(model), batches)
    assert tokens == 3 * seq_len
    assert sorted(layers) == [0, 1]
    for layer, statistics in layers.items():
        per_batch = [expected_sums(model, batch, layer) for batch in batches]
        statistics.find_constant()
        inputs_ND = torch.cat([sums.pop("input_ND") for sums in per_batch])
        assert {*per_batch[0], "constant_D"} == statistics.tensors().keys()
        torch.testing.assert_close(statistics.constant_D, constant_direction(inputs_ND), rtol=1e-8, atol=1e-10)
        for name, tensor in statistics.tensors().items():
            assert tensor.dtype == torch.float64
            if name == "constant_D":
                continue
            expected = sum(sums[name] for sums in per_batch)
            torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_gated_deltanet_takes_its_fused_convolution_here():
    """Without a cache it does, so that a hook on ``q_conv1d`` would see nothing; the sums above are of that path."""
    mixer = build("gated_deltanet").model.layers[0].attn
    assert mixer._use_fused_qkv_conv(last_state=None, use_cache=False, cu_seqlens=None)


@pytest.mark.parametrize("model_type", MODELS)
def test_the_way_rows_are_batched_changes_nothing(model_type):
    model, rows = loaded(build(model_type).double()), draw_tokens(4, 20)
    seen = []
    whole, tokens = collect(model, [rows], seen.append)
    assert (tokens, seen) == (80, [80])
    for sizes in ([2, 2], [1, 1, 1, 1], [3, 1]):
        split, split_tokens = collect(model, rows.split(sizes), seen.append)
        assert split_tokens == 80
        for layer in whole:
            for name, tensor in whole[layer].tensors().items():
                torch.testing.assert_close(split[layer].tensors()[name], tensor, rtol=1e-10, atol=1e-10)
    assert seen[1:] == [40, 40, 20, 20, 20, 20, 60, 20]


@torch.no_grad()
def test_hybrid_models_are_watched_where_they_have_a_state():
    model = build("delta_net", num_hidden_layers=3, attn={"layers": [1], "num_heads": 2})
    layers, _ = collect(loaded(model), [draw_tokens(1, 8)])
    assert sorted(layers) == [0, 2]
    assert all(statistics.input_square_D.all() for statistics in layers.values())
    assert all(statistics.output_energy_W.all() for statistics in layers.values())


@torch.no_grad()
def test_layers_of_different_key_sizes_have_sums_of_their_own():
    model = build("delta_net_2", expand_k=[1.0, 0.25], share_kv_conv=True).double()
    layers, tokens = collect(loaded(model), [draw_tokens(2, 70)])
    assert [list(layers[layer].key_gram_HKK.shape) for layer in (0, 1)] == [[2, 16, 16], [2, 4, 4]]
    for statistics in layers.values():
        unit = statistics.unit_key_gram_HKK.diagonal(dim1=1, dim2=2).sum(-1)
        torch.testing.assert_close(unit, torch.full((2,), float(tokens)).double(), rtol=1e-3, atol=0)
        assert statistics.output_gram_WVV.shape == (2, 16, 16)


def patched_state(model: torch.nn.Module) -> list:
    family = FAMILIES[model.config.model_type]
    module = sys.modules[type(model.model.layers[0].attn).forward.__module__]
    return [getattr(module, name) for name in family.operators] + [
        (len(part._forward_pre_hooks), len(part._forward_hooks)) for part in model.modules()
    ]


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_fla_is_left_as_it_was(model_type):
    model, tokens = build(model_type), draw_tokens(1, 8)
    before = patched_state(model)
    with watching(model, FAMILIES[model_type]) as layers:
        assert patched_state(model) != before
        model(tokens)
    assert patched_state(model) == before
    seen = {name: tensor.clone() for name, tensor in layers[0].tensors().items()}
    model(tokens)
    assert all(torch.equal(tensor, seen[name]) for name, tensor in layers[0].tensors().items())


@pytest.mark.parametrize("model_type", MODELS)
def test_fla_is_left_as_it_was_also_after_an_error(model_type):
    model = build(model_type)
    before = patched_state(model)
    with pytest.raises(IndexError):
        collect(loaded(model), [draw_tokens(1, 8), torch.tensor([[10**6]])])
    assert patched_state(model) == before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_batches():
    """1,000 batches against 10; q and k of all of them would be 33 MB."""
    model = loaded(build("delta_net", num_hidden_layers=1))
    sizes = []
    collect(model, (draw_tokens(2, 64) for _ in range(1000)), lambda tokens: sizes.append(resident_bytes()))
    assert len(sizes) == 1000
    assert max(sizes) - max(sizes[:10]) < 10e6


def test_queries_and_keys_may_come_once_for_each_value_head():
    """As older versions of transformers give them to the operator."""
    query, key = torch.randn(2, 5, 2, 3), torch.randn(2, 5, 2, 3)
    found = []
    for times in (1, 2):
        statistics = LayerStatistics.zeros(6, MixerSizes(2, 4, 3, 3), torch.device("cpu"))
        statistics.add_operands(query.repeat_interleave(times, 2), key.repeat_interleave(times, 2))
        found.append(statistics.tensors())
    assert found[0]["query_gram_HKK"].any()
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def test_no_tokens_are_zero_sums_of_the_shapes_in_their_names():
    statistics = LayerStatistics.zeros(6, MixerSizes(2, 4, 3, 5), torch.device("cpu"))
    sizes = {"D": 6, "H": 2, "W": 4, "K": 3, "V": 5}
    for name, tensor in statistics.tensors().items():
        assert list(tensor.shape) == [sizes[axis] for axis in name.rsplit("_", 1)[1]]
        assert tensor.dtype == torch.float64
        assert not tensor.any()

"""Rank utilisation against a plain float64 recurrence in numpy, from the operands of the model's own operators.

Shapes: B rows, T tokens, P positions, H key heads, W value heads, K key channels, V value channels.
"""

import math
import sys
import weakref
from pathlib import Path

import hybrid_models
import numpy as np
import pytest
import torch
from tiny_models import FAMILIES as MODELS
from tiny_models import build, draw_tokens

from keyreduce.errors import KeyreduceError
from keyreduce.evaluation import rank
from keyreduce.evaluation.rank import measure_rank, positions_of, rank_utilisation
from keyreduce.families import FAMILIES
from keyreduce.models.loading import LoadedModel

VARIANTS = {
    "delta_net": ("delta_net", {}),
    "delta_net narrow keys": ("delta_net", {"expand_k": 0.5, "use_gate": True}),
    "delta_net negative eigenvalues": ("delta_net", {"allow_neg_eigval": True}),
    "delta_net sum norm": ("delta_net", {"qk_norm": "sum", "qk_activation": "elu"}),
    "delta_net_2": ("delta_net_2", {"share_kv_conv": True}),
    "delta_net_2 layers of two sizes": ("delta_net_2", {"expand_k": [1.0, 0.25]}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet negative eigenvalues": ("gated_deltanet", {"allow_neg_eigval": True, "expand_v": 0.5}),
}


def loaded(model: torch.nn.Module) -> LoadedModel:
    return LoadedModel(model, None, FAMILIES[model.config.model_type], Path("tiny"))


def operands_of(model: torch.nn.Module, tokens_BT: torch.Tensor) -> list[dict]:
    """What the operator of each layer is called with."""
    family, seen = FAMILIES[model.config.model_type], []
    mixer = model.get_submodule(family.mixer.format(layer=0))
    module = sys.modules[type(mixer).forward.__module__]
    with pytest.MonkeyPatch.context() as patch:
        for name in family.operators:
            operator = getattr(module, name)

            def call(*first, operator=operator, **arguments):
                seen.append(arguments | dict(zip("qkv", first, strict=False)))
                return operator(*first, **arguments)

            patch.setattr(module, name, call)
        model.model(tokens_BT, use_cache=False)
    return seen


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def utilisation_along(arguments: dict, positions: tuple[int, ...]) -> np.ndarray:
    """``[B, P, W]``: the delta rule token by token, then the singular values of the state."""
    given = {
        name: value.double().numpy() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    key_BTHK, value_BTWV, beta_BTW = given["k"], given["v"], given["beta"]
    B, T, W, V = value_BTWV.shape
    if given["use_qk_l2norm_in_kernel"]:
        key_BTHK = key_BTHK / np.sqrt((key_BTHK**2).sum(-1, keepdims=True) + 1e-6)
    if given.get("use_beta_sigmoid_in_kernel"):
        beta_BTW = sigmoid(beta_BTW) * (2 if given["allow_neg_eigval"] else 1)
    decay_BTW = np.ones((B, T, W))
    if given.get("use_gate_in_kernel"):
        decay_BTW = np.exp(-np.exp(given["A_log"]) * np.log1p(np.exp(given["g"] + given["dt_bias"])))
    elif "g" in given:
        decay_BTW = np.exp(given["g"])
    group = W // key_BTHK.shape[2]
    found = np.zeros((B, len(positions), W))
    for row in range(B):
        for head in range(W):
            state_KV = np.zeros((key_BTHK.shape[3], V))
            for t in range(T):
                key_K = key_BTHK[row, t, head // group]
                state_KV *= decay_BTW[row, t, head]
                state_KV += beta_BTW[row, t, head] * np.outer(key_K, value_BTWV[row, t, head] - key_K @ state_KV)
                if t + 1 in positions:
                    values = np.linalg.svd(state_KV, compute_uv=False)
                    stable_rank = (values**2).sum() / values[0] ** 2
                    found[row, positions.index(t + 1), head] = stable_rank / min(state_KV.shape)
    return found


# Rows of up to 64 tokens take the recurrent operator, longer ones the chunked one.
@pytest.mark.parametrize(("seq_len", "every"), [(20, 8), (70, 16), (140, 70)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_utilisation_is_that_of_a_plain_float64_recurrence(variant, seq_len, every):
    model_type, changes = VARIANTS[variant]
    model = build(model_type, **changes).double()
    batches, ticks = [draw_tokens(2, seq_len), draw_tokens(1, seq_len, seed=1)], []
    found = measure_rank(loaded(model), batches, every, ticks.append)
    assert found.positions == positions_of(seq_len, every)
    assert found.sequences == 3
    assert ticks == [2 * seq_len, seq_len]
    per_batch = [operands_of(model, batch) for batch in batches]
    assert sorted(found.utilisation) == [0, 1]
    for layer, mean_PW in found.utilisation.items():
        expected_BPW = np.concatenate([utilisation_along(seen[layer], found.positions) for seen in per_batch])
        assert mean_PW.dtype == torch.float64
        np.testing.assert_allclose(mean_PW, expected_BPW.mean(axis=0), rtol=1e-9)
        assert expected_BPW.std() > 1e-3


@pytest.mark.parametrize("model_type", MODELS)
@torch.no_grad()
def test_what_the_model_computes_stays_the_same(model_type):
    model, tokens = build(model_type).double(), draw_tokens(2, 70)
    expected = model.model(tokens, use_cache=False).last_hidden_state
    seen = []
    hook = model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    measure_rank(loaded(model), [tokens], 9)
    hook.remove()
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.model(tokens, use_cache=False).last_hidden_state, expected)


@pytest.mark.parametrize("model_type", hybrid_models.LANGUAGE)
@torch.no_grad()
def test_hybrids_of_transformers(model_type):
    model, tokens = hybrid_models.build(model_type), draw_tokens(2, 70)
    expected = model.model(tokens, use_cache=False).last_hidden_state
    outputs = []
    hook = model.model.register_forward_hook(lambda module, args, output: outputs.append(output.last_hidden_state))
    found = measure_rank(loaded(model), [tokens], 32)
    hook.remove()
    torch.testing.assert_close(outputs[0], expected, rtol=1e-3, atol=1e-3)
    seen = operands_of(model, tokens)
    assert sorted(found.utilisation) == [0, 2]
    for arguments, mean_PW in zip(seen, found.utilisation.values(), strict=True):
        expected_PW = utilisation_along(arguments, found.positions).mean(axis=0)
        assert expected_PW.shape == (3, 4)
        np.testing.assert_allclose(mean_PW, expected_PW, rtol=1e-4)


def test_known_states():
    state_BWKV = torch.zeros(1, 4, 6, 4)
    state_BWKV[0, 1] = torch.outer(torch.arange(6.0), torch.arange(4.0))
    state_BWKV[0, 2, :4] = 1e-20 * torch.eye(4)
    state_BWKV[0, 3, :4] = 1e30 * torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    expected = torch.tensor([[0.0, 1 / 4, 1.0, 6 / 4 / 4]], dtype=torch.float64)
    torch.testing.assert_close(rank_utilisation(state_BWKV), expected)
    torch.testing.assert_close(rank_utilisation(state_BWKV.mT), expected)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (8, 8), (1, 4)])
def test_utilisation_is_that_of_the_singular_values(shape):
    state = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    values = np.linalg.svd(state.double().numpy(), compute_uv=False)
    expected = (values**2).sum(-1) / values[..., 0] ** 2 / min(shape)
    np.testing.assert_allclose(rank_utilisation(state), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("num_tokens", "every", "positions"),
    [(8, 4, (4, 8)), (9, 4, (4, 8, 9)), (3, 4, (3,)), (4, 4, (4,)), (3, 1, (1, 2, 3)), (1, 1, (1,))],
)
def test_positions(num_tokens, every, positions):
    assert positions_of(num_tokens, every) == positions


def test_one_state_at_a_time(monkeypatch):
    """At 40 positions of 2 layers and 3 batches, no state outlives the next."""
    states, most = [], []

    def spy(state_BWKV):
        states.append(weakref.ref(state_BWKV))
        most.append(sum(state() is not None for state in states))
        assert state_BWKV.shape == (2, 2, 16, 16)
        return rank_utilisation(state_BWKV)

    monkeypatch.setattr(rank, "rank_utilisation", spy)
    measure_rank(loaded(build("delta_net")), (draw_tokens(2, 80) for _ in range(3)), 2)
    assert len(states) == 40 * 2 * 3
    assert max(most) <= 2


@torch.no_grad()
def test_hybrid_models_are_measured_where_they_have_a_state():
    model = build("delta_net", num_hidden_layers=3, attn={"layers": [1], "num_heads": 2})
    found = measure_rank(loaded(model), [draw_tokens(1, 8)], 4)
    assert sorted(found.utilisation) == sorted(found.sizes) == [0, 2]
    assert all(mean_PW.all() for mean_PW in found.utilisation.values())


@pytest.mark.parametrize("model_type", MODELS)
def test_fla_is_left_as_it_was_also_after_an_error(model_type):
    model = build(model_type)
    module = sys.modules[type(model.model.layers[0].attn).forward.__module__]
    before = [getattr(module, name) for name in FAMILIES[model_type].operators]
    with pytest.raises(IndexError):
        measure_rank(loaded(model), [draw_tokens(1, 8), torch.full((1, 8), 10**6)], 4)
    assert [getattr(module, name) for name in FAMILIES[model_type].operators] == before
    assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_refused(value):
    model = build("delta_net")
    model.model.layers[1].attn.v_proj.weight.data[0, 0] = value
    with pytest.raises(KeyreduceError, match="the states of layer 1 of tiny hold NaN or inf"):
        measure_rank(loaded(model), [draw_tokens(1, 8)], 4)


def test_no_text_is_refused():
    with pytest.raises(KeyreduceError, match="the text is empty"):
        measure_rank(loaded(build("delta_net")), [], 4)


def test_rows_of_two_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        measure_rank(loaded(build("delta_net")), [draw_tokens(1, 8), draw_tokens(1, 9)], 4)


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
@torch.no_grad()
def test_fla_kernels_on_a_gpu_agree_with_the_recurrence(model_type):
    model = build(model_type).to("cuda", torch.bfloat16)
    tokens = draw_tokens(2, 200)
    found = measure_rank(loaded(model), [tokens], 64)
    seen = operands_of(model, tokens.cuda())
    for layer, mean_PW in found.utilisation.items():
        arguments = {
            name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in seen[layer].items()
        }
        expected_PW = utilisation_along(arguments, found.positions).mean(axis=0)
        np.testing.assert_allclose(mean_PW, expected_PW, rtol=0.03)

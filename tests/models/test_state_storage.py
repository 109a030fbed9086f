"""Models with a stored state against a float64 loop over what their own operators are called with.

Shapes: B rows, T tokens, H key heads, W value heads, K key channels, V value channels.
"""

import sys
from functools import partial

import hybrid_models
import pytest
import torch
import torch.nn.functional as F
from tiny_models import build, draw_tokens

from keyreduce.errors import KeyreduceError
from keyreduce.families import FAMILIES
from keyreduce.models.state_rounding import round_state
from keyreduce.models.state_storage import stored_states

VARIANTS = {
    "delta_net": ("delta_net", {}),
    "delta_net negative eigenvalues": ("delta_net", {"allow_neg_eigval": True, "expand_k": 0.5}),
    "delta_net sum norm": ("delta_net", {"qk_norm": "sum", "qk_activation": "elu", "expand_v": 0.75}),
    "delta_net hybrid": ("delta_net", {"num_hidden_layers": 3, "attn": {"layers": [1], "num_heads": 2}}),
    "delta_net_2": ("delta_net_2", {"share_kv_conv": True}),
    "delta_net_2 layers of two sizes": ("delta_net_2", {"expand_k": [1.0, 0.25]}),
    "gated_deltanet": ("gated_deltanet", {}),
    "gated_deltanet negative eigenvalues": ("gated_deltanet", {"allow_neg_eigval": True, "expand_v": 0.5}),
    **{name: (name, {}) for name in (*hybrid_models.LANGUAGE, *hybrid_models.CHANNEL_DECAY, "qwen3_5")},
}
VARIANT = pytest.mark.parametrize("variant", VARIANTS)
TOKENS = 70  # rows of up to 64 take another operator in fla


def made(variant: str) -> torch.nn.Module:
    model_type, changes = VARIANTS[variant]
    make = build if model_type in ("delta_net", "delta_net_2", "gated_deltanet") else hybrid_models.build
    model = make(model_type, **changes).double()
    model.set_experts_implementation("eager")  # the others take no float64
    return model


def run(model: torch.nn.Module, tokens: torch.Tensor, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False, **more).logits


def rule(arguments: dict, every: int, store) -> torch.Tensor:
    """Return what an operator gives with these arguments, by the definition, with the state stored on the way."""
    q, k, v, beta = (arguments[name].double() for name in ("q", "k", "v", "beta"))
    if arguments.get("use_qk_l2norm_in_kernel"):
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    if arguments.get("use_beta_sigmoid_in_kernel"):
        beta = beta.sigmoid() * (2 if arguments.get("allow_neg_eigval") else 1)
    g = arguments.get("g")
    if arguments.get("use_gate_in_kernel"):
        A_log, dt_bias = arguments["A_log"].double(), arguments["dt_bias"].double()
        rate = -A_log.exp() if g.ndim == 3 else -A_log.exp()[:, None]
        g = rate * F.softplus(g.double() + dt_bias.view(g.shape[2:]))
    (B, T, H, K), (W, V) = k.shape, v.shape[2:]
    output = torch.zeros(B, T, W, V, dtype=torch.float64)
    state_BWKV = torch.zeros(B, W, K, V, dtype=torch.float64)
    for t in range(T):
        for row in range(B):
            for head in range(W):
                S, key, query = state_BWKV[row, head], k[row, t, head * H // W], q[row, t, head * H // W]
                if g is not None:
                    S = S * g[row, t, head].double().exp().view(-1, 1)
                S = S + torch.outer(key, beta[row, t, head] * (v[row, t, head] - S.T @ key))
                output[row, t, head] = S.T @ query * K**-0.5
                state_BWKV[row, head] = S
        if (t + 1) % every == 0:
            state_BWKV = store(state_BWKV)
    return output


def looped(model: torch.nn.Module, tokens: torch.Tensor, every: int, store) -> torch.Tensor:
    """Logits of a model whose operators are the loop above."""
    family = FAMILIES[model.config.model_type]
    layer = family.mixer_layers(model.config.to_dict())[0]
    module = sys.modules[type(model.get_submodule(family.mixer.format(layer=layer))).forward.__module__]
    with pytest.MonkeyPatch.context() as patch:
        for name in family.operators:

            def call(*first, **arguments):
                arguments |= dict(zip("qkv", first, strict=False))
                return rule(arguments, every, store).to(arguments["v"].dtype), None

            patch.setattr(module, name, call)
        return run(model, tokens)


@VARIANT
@pytest.mark.parametrize(("chunk", "dtype"), [(None, "int8"), (None, "bfloat16"), (16, "int4")])
def test_logits_are_those_of_a_loop_that_stores(variant, chunk, dtype):
    model, tokens = made(variant), draw_tokens(1, TOKENS)
    family = FAMILIES[model.config.model_type]
    expected = looped(model, tokens, chunk or 1, lambda state: round_state(state, dtype))
    with stored_states(model, family, dtype, chunk):
        found = run(model, tokens)
    # Kimi Linear's forget gate is in float32, whatever the model's dtype.
    tolerance = (1e-4 if variant == "kimi_linear" else 1e-6) * float(expected.std())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    assert (found - run(model, tokens)).abs().max() > 10 * tolerance


@VARIANT
def test_float32_changes_nothing(variant):
    model, tokens = made(variant), draw_tokens(2, TOKENS)
    family = FAMILIES[model.config.model_type]
    expected = run(model, tokens)
    with stored_states(model, family, "float32"):
        found = run(model, tokens)
    # transformers' operators compute in float32, whatever the model's dtype.
    tolerance = 1e-12 if family.shipped_by != "transformers" else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.std()))


@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
def test_float32_is_the_same_to_the_last_bit(model_type):
    model, tokens = build(model_type), draw_tokens(2, TOKENS)
    expected = run(model, tokens)
    with stored_states(model, FAMILIES[model_type], "float32"):
        assert torch.equal(run(model, tokens), expected)
    with stored_states(model, FAMILIES[model_type], "bfloat16"):
        assert not torch.equal(run(model, tokens), expected)
    assert torch.equal(run(model, tokens), expected)


@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
def test_one_head_alone(model_type):
    """What a head stores changes its own readout, no other of its layer, and no layer before it."""

    def see(seen, part, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    model, tokens = build(model_type).double(), draw_tokens(1, TOKENS)
    family = FAMILIES[model_type]
    heads = family.sizes(model.config.to_dict()).value_heads
    choice = {0: ["float32"] * heads, 1: ["float32"] * (heads - 1) + ["int4"]}
    outputs = []
    for dtypes in ("float32", choice):
        seen = []
        mixer = model.model.layers[1].attn
        hooks = [part.register_forward_pre_hook(partial(see, seen), with_kwargs=True) for part in (mixer, mixer.o_norm)]
        with stored_states(model, family, dtypes):
            run(model, tokens)
        for hook in hooks:
            hook.remove()
        outputs.append(seen)
    (before, exact), (same, rounded) = outputs
    torch.testing.assert_close(same, before, rtol=1e-12, atol=1e-12)
    exact, rounded = (readout.view(TOKENS, heads, -1) for readout in (exact, rounded))
    torch.testing.assert_close(rounded[:, :-1], exact[:, :-1], rtol=1e-9, atol=1e-9)
    assert (rounded[:, -1] - exact[:, -1]).abs().max() > 1e-2 * exact.std()


@pytest.mark.parametrize("variant", ["delta_net", "gated_deltanet", "kda", "qwen3_next", "kimi_linear"])
def test_decoding_stores_after_each_token(variant):
    """Prefill and step by step with a cache give what one pass gives, since the cache holds what was stored."""
    model, tokens = made(variant), draw_tokens(1, 12)
    family = FAMILIES[model.config.model_type]
    with stored_states(model, family, "bfloat16"), torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache, steps = None, []
        for part in (tokens[:, :5], *tokens[:, 5:].split(1, dim=1)):
            result = model(part, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            steps.append(result.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("model_type", ["delta_net", "qwen3_next"])
def test_all_is_as_before_also_after_an_error(model_type):
    model = made(model_type)
    family = FAMILIES[model_type]
    module = sys.modules[type(model.get_submodule(family.mixer.format(layer=0))).forward.__module__]
    before = [getattr(module, name) for name in family.operators]
    with pytest.raises(IndexError), stored_states(model, family, "int8"):
        run(model, torch.full((1, 8), 10**6))
    assert [getattr(module, name) for name in family.operators] == before
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_operators_that_are_out_of_reach_are_refused(monkeypatch):
    """Older versions of transformers hold them where nobody can replace them; then nothing would be rounded."""
    model = made("qwen3_next")
    for layer in (0, 2):
        monkeypatch.setattr(model.model.layers[layer].linear_attn, "forward", lambda hidden_states, **_: hidden_states)
    hidden = pytest.raises(KeyreduceError, match="hides the operators of qwen3_next")
    with hidden, stored_states(model, FAMILIES["qwen3_next"], "int8"):
        run(model, draw_tokens(1, 8))
    with stored_states(model, FAMILIES["qwen3_next"], "int8"):
        pass  # no mixer ran


def test_an_unknown_format_is_refused():
    unknown = pytest.raises(KeyreduceError, match="take one of")
    with unknown, stored_states(build("delta_net"), FAMILIES["delta_net"], "int3"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "fp8", "int4-rotated"])
@pytest.mark.parametrize("chunk", [None, 16])
@pytest.mark.parametrize("model_type", ["delta_net", "gated_deltanet"])
def test_a_gpu_agrees_with_the_cpu(model_type, chunk, dtype):
    model, tokens, family = build(model_type).double(), draw_tokens(2, 200), FAMILIES[model_type]
    with stored_states(model, family, dtype, chunk):
        expected = run(model, tokens)
    model = model.cuda()
    import fla_torch

    fla_torch.enable(cuda=True)
    try:
        with stored_states(model, family, dtype, chunk):
            found = run(model, tokens.cuda()).cpu()
    finally:
        fla_torch.enable()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))

"""DeltaNet2 against a plain float64 loop, against fla's DeltaNet, and against itself one token at a time."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from fla.models import DeltaNetConfig, DeltaNetForCausalLM
from tiny_models import COMMON, draw_tokens

from keyreduce.models.delta_net_2 import DeltaNet2, DeltaNet2Config, DeltaNet2ForCausalLM, SharedShortConvolution

CONVOLUTIONS = {
    "one kernel": dict(),
    "one per head": dict(per_head_conv=True),
    "k and v alike": dict(per_head_conv=True, share_kv_conv=True, conv_size=3),
    "one for k and v": dict(share_kv_conv=True),
    "shift": dict(shift_only_conv=True),
    "scaled shift": dict(shift_only_conv=True, conv_scaled_shift=True),
    "scaled shift per head": dict(
        shift_only_conv=True, conv_scaled_shift=True, per_head_conv=True, share_kv_conv=True
    ),
    "none": dict(use_short_conv=False),
}  # fmt: skip
OTHERS = {
    "gate": dict(use_gate=True, per_head_conv=True, expand_v=0.5),
    "relu, sum": dict(qk_activation="relu", qk_norm="sum", per_head_conv=True),
    "elu, negative eigenvalues": dict(qk_activation="elu", allow_neg_eigval=True, share_kv_conv=True),
    "identity, no beta": dict(qk_activation="identity", use_beta=False, per_head_conv=True),
    "sizes per layer": dict(expand_k=[0.3125, 0.75], expand_v=1.5, per_head_conv=True, share_kv_conv=True),
    "tied, unfused": dict(tie_word_embeddings=True, fuse_norm=False, fuse_swiglu=False),
    "no convolution, relu": dict(use_short_conv=False, qk_activation="relu", use_gate=True),
}
ALL = CONVOLUTIONS | OTHERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:ShortConvolution is crucial"),
    # The name that it is to have later, older versions of transformers do not know.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
]


def build(seed=0, **changes) -> DeltaNet2ForCausalLM:
    """A tiny random model whose scales and norm weights are random too."""
    torch.manual_seed(seed)
    model = DeltaNet2ForCausalLM(DeltaNet2Config(**COMMON | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("scale"):
                parameter.uniform_(0.5, 1.5)
    return model


def every(options):
    return pytest.mark.parametrize("changes", options.values(), ids=options)


# The definition, one token after the other.


def taps_of(state, config, prefix, name, head):
    """What a head's convolution weighs the latest token by, the one before, and so on."""
    head = head if config.per_head_conv else 0
    if not config.shift_only_conv:
        return state[f"{prefix}{name}.weight"][head, 0].flip(0).tolist()
    if config.conv_scaled_shift:
        return [1.0, state[f"{prefix}{name}.scale"][head].item()]
    return [0.0, 1.0]


def normalized(x, weight, eps):
    return x / (x.square().mean() + eps).sqrt() * weight


def mix_one_by_one(state, config, prefix, x_TD):
    H = config.num_heads
    projected = {name: x_TD @ state[f"{prefix}{name}_proj.weight"].T for name in "qkv"}
    sizes = {name: tensor.shape[1] // H for name, tensor in projected.items()}
    output_TD = torch.zeros_like(x_TD)
    for h in range(H):
        memory_KV = x_TD.new_zeros(sizes["k"], sizes["v"])
        for t in range(len(x_TD)):
            vectors = {}
            for name in "qkv":
                own_TX = projected[name][:, h * sizes[name] : (h + 1) * sizes[name]]
                vector_X = own_TX[t]
                if config.use_short_conv:
                    convolution = ("kv" if config.share_kv_conv and name != "q" else name) + "_conv1d"
                    vector_X = torch.zeros_like(vector_X)
                    for back, tap in enumerate(taps_of(state, config, prefix, convolution, h)):
                        if t - back >= 0:
                            vector_X = vector_X + tap * own_TX[t - back]
                activation = "silu" if name == "v" else config.qk_activation
                if activation == "silu":
                    vector_X = vector_X / (1 + (-vector_X).exp())
                elif activation == "relu":
                    vector_X = vector_X.clamp(min=0)
                elif activation == "elu":
                    vector_X = torch.where(vector_X > 0, vector_X + 1, vector_X.exp())
                if name != "v" and config.qk_norm == "l2":
                    vector_X = vector_X / (vector_X.square().sum() + 1e-6).sqrt()
                elif name != "v":
                    vector_X = vector_X / vector_X.abs().sum().clamp(min=1e-6)
                vectors[name] = vector_X
            beta = torch.sigmoid(x_TD[t] @ state[f"{prefix}b_proj.weight"][h]) if config.use_beta else 1.0
            beta = beta * (2 if config.allow_neg_eigval else 1)
            update_V = beta * (vectors["v"] - memory_KV.T @ vectors["k"])
            memory_KV = memory_KV + torch.outer(vectors["k"], update_V)
            read_V = memory_KV.T @ vectors["q"] / math.sqrt(sizes["k"])
            read_V = normalized(read_V, state[f"{prefix}o_norm.weight"], config.norm_eps)
            own = slice(h * sizes["v"], (h + 1) * sizes["v"])
            if config.use_gate:
                gate_V = x_TD[t] @ state[f"{prefix}g_proj.weight"][own].T
                read_V = read_V * gate_V / (1 + (-gate_V).exp())
            output_TD[t] += state[f"{prefix}o_proj.weight"][:, own] @ read_V
    return output_TD


def reference_logits(model, tokens_T):
    state = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    config = model.config
    x_TD = state["model.embeddings.weight"][tokens_T]

    def norm(x_TD, name):
        return torch.stack([normalized(x_D, state[name], config.norm_eps) for x_D in x_TD])

    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        x_TD = x_TD + mix_one_by_one(state, config, f"{prefix}attn.", norm(x_TD, f"{prefix}attn_norm.weight"))
        hidden_TD = norm(x_TD, f"{prefix}mlp_norm.weight")
        gate_TD = hidden_TD @ state[f"{prefix}mlp.gate_proj.weight"].T
        up_TD = hidden_TD @ state[f"{prefix}mlp.up_proj.weight"].T
        x_TD = x_TD + (gate_TD * gate_TD.sigmoid() * up_TD) @ state[f"{prefix}mlp.down_proj.weight"].T
    return norm(x_TD, "model.norm.weight") @ state["lm_head.weight"].T


@every(ALL)
@torch.no_grad()
def test_logits_are_those_of_the_definition(changes):
    model = build(**changes)
    tokens = draw_tokens(1, 9)
    expected = reference_logits(model, tokens[0])
    assert expected.std() > 0.1
    torch.testing.assert_close(model.double()(tokens).logits[0], expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_long_sequences_take_the_chunked_operator():
    model = build(share_kv_conv=True, per_head_conv=True)
    tokens = draw_tokens(1, 70)
    expected = reference_logits(model, tokens[0])
    torch.testing.assert_close(model.double()(tokens).logits[0], expected, rtol=1e-7, atol=1e-7)


def stock_twin(model):
    """fla's DeltaNet with each kernel copied to all its channels."""
    config = model.config
    twin = DeltaNetForCausalLM(DeltaNetConfig(**COMMON, expand_k=config.expand_k, expand_v=config.expand_v)).eval()
    state = model.state_dict()
    for name, tensor in twin.state_dict().items():
        if "conv1d" in name:
            shared = state[name] if name in state else state[re.sub(r"[kv]_conv1d", "kv_conv1d", name)]
            state[name] = shared.repeat_interleave(len(tensor) // len(shared), dim=0)
    twin.load_state_dict({name: state[name] for name in twin.state_dict()})
    return twin


@pytest.mark.parametrize("length", [9, 70])
@every({name: CONVOLUTIONS[name] for name in ("one kernel", "one per head", "one for k and v")})
def test_a_kernel_copied_to_its_channels_gives_the_stock_model_and_sums_its_gradients(changes, length):
    model = build(**changes, expand_k=0.5, expand_v=1.5)
    twin = stock_twin(model)
    tokens = draw_tokens(2, length)
    ours, stock = model(tokens, labels=tokens), twin(tokens, labels=tokens)
    torch.testing.assert_close(ours.logits, stock.logits, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    stock.loss.backward()
    for layer, stock_layer in zip(model.model.layers, twin.model.layers, strict=True):
        of_each = {
            name: getattr(stock_layer.attn, f"{name}_conv1d")
            .weight.grad.unflatten(0, (model.config.num_heads if model.config.per_head_conv else 1, -1))
            .sum(dim=1)
            for name in "qkv"
        }
        if model.config.share_kv_conv:
            of_each = {"q": of_each["q"], "kv": of_each["k"] + of_each["v"]}
        for name, gradient in of_each.items():
            assert gradient.abs().max() > 1e-4
            found = getattr(layer.attn, f"{name}_conv1d").weight.grad
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5)


@every({name: changes for name, changes in CONVOLUTIONS.items() if name not in ("shift", "none")})
def test_gradients_of_kernels_and_scales_are_finite_differences(changes):
    model = build(**changes, num_hidden_layers=1, fuse_cross_entropy=False).double()
    tokens = draw_tokens(1, 8)

    def loss():
        return model(tokens, labels=tokens, use_cache=False).loss

    loss().backward()
    parameters = {name: parameter for name, parameter in model.named_parameters() if "conv1d" in name}
    assert parameters
    for parameter in parameters.values():
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            losses = []
            for step in (1e-5, -2e-5):
                flat[i] += step
                losses.append(loss().item())
            flat[i] += 1e-5
            slope = (losses[0] - losses[1]) / 2e-5
            assert parameter.grad.view(-1)[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def rotate_key_channels(model):
    """Turn the key channels of each head by a random rotation of its own, q and k alike."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        K, H = layer.attn.head_k_dim, layer.attn.num_heads
        turns_HKK = torch.linalg.qr(torch.randn(H, K, K, generator=generator, dtype=torch.float64))[0]
        for projection in (layer.attn.q_proj, layer.attn.k_proj):
            weight_HKD = projection.weight.data.unflatten(0, (H, K))
            projection.weight.data = (turns_HKK @ weight_HKD).flatten(0, 1)


@pytest.mark.parametrize("length", [12, 70])
@every(CONVOLUTIONS)
@torch.no_grad()
def test_a_rotation_of_key_channels_leaves_the_logits_where_the_activation_is_the_identity(changes, length):
    model = build(qk_activation="identity", **changes).double()
    tokens = draw_tokens(2, length)
    before = model(tokens).logits
    rotate_key_channels(model)
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_an_activation_or_kernels_per_channel_make_a_rotation_show():
    tokens = draw_tokens(2, 12)
    stock = DeltaNetForCausalLM(DeltaNetConfig(**COMMON, qk_activation="identity")).eval()
    for model in (build(per_head_conv=True).double(), stock.double()):
        before = model(tokens).logits
        rotate_key_channels(model)
        assert (model(tokens).logits - before).abs().max() > 0.01


# One token at a time, padded, packed.


@every(ALL)
@torch.no_grad()
def test_decoding_through_the_cache_gives_the_logits_of_one_pass(changes):
    model = build(**changes).double()
    tokens = draw_tokens(2, 10)
    expected = model(tokens).logits
    for prefill in (1, 4, 9):
        output = model(tokens[:, :prefill], use_cache=True)
        parts = [output.logits]
        for t in range(prefill, 10):
            output = model(tokens[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
            parts.append(output.logits)
        assert output.past_key_values.get_seq_length() == 10
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_several_tokens_at_once_continue_a_cache():
    model = build(per_head_conv=True, share_kv_conv=True).double()
    tokens = draw_tokens(2, 12)
    output = model(tokens[:, :2], use_cache=True)
    later = model(tokens[:, 2:], past_key_values=output.past_key_values, use_cache=True)
    torch.testing.assert_close(later.logits, model(tokens).logits[:, 2:], rtol=1e-8, atol=1e-8)


@every({"one kernel": {}, "shift": CONVOLUTIONS["shift"], "sizes per layer": OTHERS["sizes per layer"]})
@torch.no_grad()
def test_generate_takes_the_likeliest_token_again_and_again(changes):
    model = build(**changes)
    tokens = draw_tokens(2, 5)
    expected = tokens
    for _ in range(8):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    mask = torch.ones_like(tokens)
    found = model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)


@every({"one per head": CONVOLUTIONS["one per head"], "shift": CONVOLUTIONS["shift"], "none": CONVOLUTIONS["none"]})
@torch.no_grad()
def test_padding_on_the_left_changes_nothing(changes):
    model = build(**changes).double()
    short, long = draw_tokens(1, 6, seed=1), draw_tokens(1, 9, seed=2)
    padded = torch.cat([F.pad(short, (3, 0), value=7), long])
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    output = model(padded, attention_mask=mask, use_cache=True)
    torch.testing.assert_close(output.logits[0, 3:], model(short).logits[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(output.logits[1], model(long).logits[0], rtol=1e-8, atol=1e-8)
    # And a step further, through the cache.
    following = draw_tokens(2, 1, seed=3)
    step = model(
        following, attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=output.past_key_values, use_cache=True
    )
    for row, start in enumerate((short, long)):
        expected = model(torch.cat([start, following[row : row + 1]], dim=1)).logits[0, -1]
        torch.testing.assert_close(step.logits[row, 0], expected, rtol=1e-8, atol=1e-8)


@every(CONVOLUTIONS)
@torch.no_grad()
def test_packed_sequences_do_not_see_one_another(changes):
    model = build(**changes).double()
    tokens = draw_tokens(1, 12)
    packed = model(tokens, cu_seqlens=torch.tensor([0, 5, 12])).logits
    apart = torch.cat([model(tokens[:, :5]).logits, model(tokens[:, 5:]).logits], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-8, atol=1e-8)
    # As many tokens as sequences, and yet not one for each: this is no decoding step.
    packed = model(tokens[:, :2], cu_seqlens=torch.tensor([0, 2, 2])).logits
    torch.testing.assert_close(packed, model(tokens[:, :2]).logits, rtol=1e-8, atol=1e-8)


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(AssertionError, match=r"attention masks of shape"):
        build()(draw_tokens(1, 3), attention_mask=torch.ones(1, 3, 3))


# Sizes, training.


def test_each_layer_has_a_key_size_of_its_own():
    model = build(expand_k=[0.25, 1.5], expand_v=1.5)
    assert [layer.attn.head_k_dim for layer in model.model.layers] == [4, 24]
    assert [len(layer.attn.k_proj.weight) for layer in model.model.layers] == [8, 48]
    cache = model(draw_tokens(3, 4), use_cache=True).past_key_values
    assert [cache[layer]["recurrent_state"].shape for layer in (0, 1)] == [(3, 2, 4, 24), (3, 2, 24, 24)]
    assert [[state.shape[1] for state in cache[layer]["conv_state"]] for layer in (0, 1)] == [[8, 8, 48], [48, 48, 48]]


def test_tensors_are_named_as_in_fla_but_for_the_convolutions():
    stock = DeltaNetForCausalLM(DeltaNetConfig(**COMMON, use_gate=True, attnres_block_size=2)).state_dict()
    for changes in CONVOLUTIONS.values():
        state = build(**changes, use_gate=True, attnres_block_size=2).state_dict()
        others = {name: tensor.shape for name, tensor in state.items() if "conv1d" not in name}
        assert others == {name: tensor.shape for name, tensor in stock.items() if "conv1d" not in name}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("one kernel", {"q_conv1d.weight": (1, 1, 4), "k_conv1d.weight": (1, 1, 4), "v_conv1d.weight": (1, 1, 4)}),
        ("one per head", {"q_conv1d.weight": (2, 1, 4), "k_conv1d.weight": (2, 1, 4), "v_conv1d.weight": (2, 1, 4)}),
        ("k and v alike", {"q_conv1d.weight": (2, 1, 3), "kv_conv1d.weight": (2, 1, 3)}),
        ("shift", {}),
        ("scaled shift", {"q_conv1d.scale": (1,), "k_conv1d.scale": (1,), "v_conv1d.scale": (1,)}),
        ("scaled shift per head", {"q_conv1d.scale": (2,), "kv_conv1d.scale": (2,)}),
        ("none", {}),
    ],
)
def test_what_the_convolutions_store(options, expected):
    mixer = build(**CONVOLUTIONS[options]).model.layers[1].attn
    assert {name: tuple(tensor.shape) for name, tensor in mixer.state_dict().items() if "conv1d" in name} == expected


def test_softmax_layers_stay_what_they_are():
    model = build(attn={"layers": [1], "num_heads": 4}, expand_k=[0.5, 1.0])
    assert [type(layer.attn).__name__ for layer in model.model.layers] == ["DeltaNet2", "Attention"]


def test_gradient_checkpointing_changes_no_gradient():
    tokens = draw_tokens(2, 70)
    gradients = []
    for is_on in (False, True):
        model = build(per_head_conv=True, share_kv_conv=True, expand_k=[0.5, 1.0]).train()
        if is_on:
            model.gradient_checkpointing_enable()
        calls = []
        model.model.layers[0].attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(tokens, labels=tokens).loss.backward()
        assert len(calls) == 1 + is_on
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-7)


def test_the_operators_are_looked_up_in_the_module_of_the_forward_method(monkeypatch):
    import fla.layers.delta_net as module

    assert DeltaNet2.forward.__module__ == module.__name__
    seen = []
    for name in ("chunk_delta_rule", "fused_recurrent_delta_rule"):
        original = getattr(module, name)

        def record(original=original, name=name, **arguments):
            seen.append((name, {key: tuple(arguments[key].shape) for key in ("q", "k", "v", "beta")}))
            return original(**arguments)

        monkeypatch.setattr(module, name, record)
    model = build(expand_k=0.5, num_hidden_layers=1)
    for length in (5, 70):
        model(draw_tokens(2, length))
    shapes = [dict(q=(2, T, 2, 8), k=(2, T, 2, 8), v=(2, T, 2, 16), beta=(2, T, 2)) for T in (5, 70)]
    assert seen == [("fused_recurrent_delta_rule", shapes[0]), ("chunk_delta_rule", shapes[1])]


def test_new_kernels_are_drawn_and_new_scales_are_one():
    torch.manual_seed(0)
    weight = SharedShortConvolution(num_kernels=500, kernel_size=4).weight
    assert weight.abs().max() <= 0.5 and weight.std().item() == pytest.approx(1 / 12**0.5, rel=0.1)
    assert torch.equal(SharedShortConvolution(3, 4, shift_only=True, scaled_shift=True).scale, torch.ones(3))

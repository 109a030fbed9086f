"""The sums of calibration for transformers' hybrids, against the same from the weights and from plain autograd.

Shapes: B rows, T tokens, N = B * T, D hidden, H key heads, K key channels, W value heads, V value channels.
"""

from pathlib import Path

import hybrid_models
import pytest
import torch
import torch.nn.functional as F
from tiny_models import draw_tokens
from transformers import AutoModelForCausalLM

from keyreduce.calibration.capture import collect
from keyreduce.families import FAMILIES
from keyreduce.models.loading import LoadedModel

ALL = pytest.mark.parametrize("model_type", hybrid_models.HYBRIDS)


def load(tmp_path, model_type: str) -> LoadedModel:
    """The language model of a folder, in float64, as load_model finds it."""
    folder = hybrid_models.store(hybrid_models.build(model_type), tmp_path / model_type)
    # The faster ways to compute experts take no float64.
    options = {"experts_implementation": "eager"} if "moe" in model_type or model_type == "qwen3_next" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()
    return LoadedModel(model, None, FAMILIES[model.config.model_type], Path(folder))


def rows_of(model_type: str, which: str) -> tuple[str, list[int]]:
    """The weight that holds the rows of q, k or v, and which they are: counted out by hand, for the sizes above."""
    if model_type == "olmo_hybrid":
        return f"{which}_proj", list(range({"q": 16, "k": 16, "v": 24}[which]))
    if model_type == "qwen3_next":
        start, count = {"q": (0, 8), "k": (8, 8), "v": (16, 12)}[which]
        return "in_proj_qkvz", [head * 40 + start + row for head in range(2) for row in range(count)]
    start, count = {"q": (0, 16), "k": (16, 16), "v": (32, 24)}[which]
    return "in_proj_qkv", list(range(start, start + count))


def operand(mixer, model_type: str, which: str, input_BTD: torch.Tensor) -> torch.Tensor:
    """q, k or v from the weights: projection, causal depthwise convolution, SiLU; ``[N, heads, channels]``."""
    name, rows = rows_of(model_type, which)
    channels_BCT = (input_BTD @ getattr(mixer, name).weight.double()[rows].T).transpose(1, 2)
    start = {"q": 0, "k": 16, "v": 32}[which]
    if hasattr(mixer, "conv1d"):
        kernel_C1W = mixer.conv1d.weight.double()[start : start + len(rows)]
    else:  # OLMo-Hybrid up to transformers 5.14
        kernel_C1W = getattr(mixer, f"{which}_conv1d").weight.double()
    padded = F.pad(channels_BCT, (kernel_C1W.shape[-1] - 1, 0))
    result = F.silu(F.conv1d(padded, kernel_C1W, groups=len(rows))).transpose(1, 2)
    return result.unflatten(-1, (-1, 6 if which == "v" else 8)).flatten(0, 1)


@pytest.mark.parametrize("seq_len", [9, 70])
@ALL
@torch.no_grad()
def test_sums_are_those_of_a_plain_float64_computation(tmp_path, model_type, seq_len):
    loaded = load(tmp_path, model_type)
    model, tokens, inputs = loaded.model, draw_tokens(2, seq_len), {}
    mixers = {layer: model.model.layers[layer].linear_attn for layer in (0, 2)}
    hooks = [
        mixer.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: inputs.__setitem__(layer, (args or (kwargs["hidden_states"],))[0]),
            with_kwargs=True,
        )
        for layer, mixer in mixers.items()
    ]
    layers, count = collect(loaded, [tokens])
    for hook in hooks:
        hook.remove()
    assert (sorted(layers), count) == ([0, 2], 2 * seq_len)
    for layer, mixer in mixers.items():
        statistics, input_BTD = layers[layer], inputs[layer].double()
        assert statistics.output_energy_W.all()
        expected = {"input_square_D": input_BTD.square().sum((0, 1))}
        for word, which in (("query", "q"), ("key", "k")):
            rows_NHK = operand(mixer, model_type, which, input_BTD)
            unit_NHK = rows_NHK / (rows_NHK.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            expected |= {
                f"{word}_gram_HKK": torch.einsum("nhk,nhl->hkl", rows_NHK, rows_NHK),
                f"unit_{word}_gram_HKK": torch.einsum("nhk,nhl->hkl", unit_NHK, unit_NHK),
            }
        for name, tensor in expected.items():
            torch.testing.assert_close(getattr(statistics, name), tensor, rtol=1e-6, atol=1e-6, msg=name)


@ALL
def test_gradients_of_packed_projections_are_those_of_their_rows(tmp_path, model_type):
    loaded = load(tmp_path, model_type)
    model, tokens = loaded.model, draw_tokens(2, 9)
    layers, _ = collect(loaded, [tokens], gradients=True)
    mixer = model.model.layers[2].linear_attn
    output = mixer.o_proj if model_type == "olmo_hybrid" else mixer.out_proj
    weights = {word: getattr(mixer, rows_of(model_type, word[0])[0]).weight for word in ("query", "key", "value")}
    weights["output"] = output.weight
    signed = dict.fromkeys(weights, 0)
    squared, total = dict(signed), dict(signed)
    for tokens_T in tokens:
        model.zero_grad()
        F.cross_entropy(model(tokens_T[None]).logits[0, :-1], tokens_T[1:]).backward()
        for word, weight in weights.items():
            effect = (weight.detach() * weight.grad).double()
            gradient = weight.grad.double().clone()
            rows = effect.sum(0) if word == "output" else effect.sum(1)[rows_of(model_type, word[0])[1]]
            signed[word], squared[word] = signed[word] + rows, squared[word] + rows**2
            total[word] = total[word] + gradient
    for word, weight in weights.items():
        element = (weight.detach() * total[word]).abs()
        element = element.sum(0) if word == "output" else element.sum(1)[rows_of(model_type, word[0])[1]]
        for form, expected in (("signed", signed[word]), ("squared", squared[word]), ("element", element)):
            found = layers[2].taylor.of(form, word)
            # Up to transformers 5.14 a part of the model computes in float32, whatever it is given.
            torch.testing.assert_close(found.flatten(), expected, rtol=1e-5, atol=1e-7, msg=f"{form} {word}")


@ALL
@torch.no_grad()
def test_transformers_is_left_as_it_was(tmp_path, model_type):
    loaded, tokens = load(tmp_path, model_type), draw_tokens(1, 8)
    before = loaded.model(tokens).logits
    layers, _ = collect(loaded, [tokens])
    seen = layers[0].key_gram_HKK.clone()
    assert torch.equal(loaded.model(tokens).logits, before)
    assert torch.equal(layers[0].key_gram_HKK, seen)

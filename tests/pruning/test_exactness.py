"""What a cut means: the pruned model is the dense one with the dropped query and key channels at zero.

The delta-rule operator scales by ``head_k_dim ** -0.5``, which the norm of its output takes away, but for that norm's
eps. So the eps is made tiny here, in both models.

Shapes: H key heads, R kept channels of a head.
"""

import json

import pytest
import torch
from tiny_models import FAMILIES, build, draw_tokens, save, tensors_of
from transformers import AutoModelForCausalLM

from keyreduce.checkpoint.folder import open_folder
from keyreduce.families import FAMILIES as TABLES
from keyreduce.pruning.plan import Plan
from keyreduce.pruning.prune import write_pruned

# Both families have two key heads here, of 16 and of 12 channels.
CASES = [("delta_net", keep) for keep in (1, 2, 7, 15, 16)] + [("gated_deltanet", keep) for keep in (1, 5, 11, 12)]
FULL = {"delta_net": 16, "gated_deltanet": 12}


def load(folder, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for layer in model.model.layers:
        layer.attn.o_norm.eps = 1e-30
    return model


def kept_channels(folder) -> dict[int, torch.Tensor]:
    (step,) = json.loads((folder / "keyreduce.json").read_text())["steps"]
    return {int(layer): torch.tensor(rows) for layer, rows in step["kept"].items()}


def masked(folder, kept, dtype=torch.float64):
    """The dense model with zero rows in its query and key projections where a channel is dropped."""
    model = load(folder, dtype)
    for layer, kept_HR in kept.items():
        mixer = model.model.layers[layer].attn
        for projection in (mixer.q_proj, mixer.k_proj):
            for head, rows in enumerate(projection.weight.data.unflatten(0, (len(kept_HR), -1))):
                dropped = sorted(set(range(len(rows))) - set(kept_HR[head].tolist()))
                rows[dropped] = 0
    return model


# Rows of up to 64 tokens take the recurrent operator, longer ones the chunked one.
@pytest.mark.parametrize("seq_len", [9, 70])
@pytest.mark.parametrize(("model_type", "keep"), CASES)
@torch.no_grad()
def test_sliced_is_dense_with_zeroed_channels(tiny_folder, pruned, model_type, keep, seq_len):
    source, tokens = tiny_folder(model_type), draw_tokens(2, seq_len)
    target = pruned(source, keep)
    kept = kept_channels(target)
    assert [kept_HR.shape for kept_HR in kept.values()] == [(2, keep)] * 2
    sliced = load(target)
    assert sliced.model.layers[0].attn.head_k_dim == keep
    expected = masked(source, kept)(tokens).logits
    torch.testing.assert_close(sliced(tokens).logits, expected, rtol=1e-8, atol=1e-8)
    if keep < FULL[model_type]:
        assert not torch.allclose(load(source)(tokens).logits, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_sliced_is_dense_with_zeroed_channels_in_float32(tiny_folder, pruned, model_type):
    source, tokens = tiny_folder(model_type), draw_tokens(2, 70)
    target = pruned(source, 6)
    expected = masked(source, kept_channels(target), torch.float32)(tokens).logits
    torch.testing.assert_close(load(target, torch.float32)(tokens).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:ShortConvolution is crucial")
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("delta_net", {"use_short_conv": False}),
        ("delta_net", {"use_gate": True, "use_beta": False, "expand_v": 1.5}),
        ("delta_net", {"qk_norm": "sum", "qk_activation": "relu"}),
        ("delta_net", {"num_heads": 4, "num_hidden_layers": 3, "allow_neg_eigval": True}),
        ("gated_deltanet", {"use_short_conv": False, "use_gate": False}),
        ("gated_deltanet", {"num_v_heads": None, "expand_v": 1.5}),
    ],
    ids=str,
)
@torch.no_grad()
def test_sliced_is_dense_with_zeroed_channels_for_other_options(tmp_path, pruned, model_type, options):
    source, tokens = save(build(model_type, **options), tmp_path / "source"), draw_tokens(2, 20)
    target = pruned(source, 5)
    expected = masked(source, kept_channels(target))(tokens).logits
    torch.testing.assert_close(load(target)(tokens).logits, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_keeping_all_channels_is_the_identity(tiny_folder, pruned, model_type):
    source = tiny_folder(model_type)
    target = pruned(source, FULL[model_type])
    before, after = tensors_of(source), tensors_of(target)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_the_order_of_the_kept_channels_does_not_matter(tiny_folder, tmp_path, model_type):
    checkpoint, tokens = open_folder(tiny_folder(model_type)), draw_tokens(2, 70)
    sizes = TABLES[model_type].sizes(checkpoint.config)
    ascending = {layer: torch.tensor([[0, 3, 4, 7, 9], [1, 2, 5, 6, 11]]) for layer in (0, 1)}
    shuffled = {layer: kept_HR[:, [3, 0, 4, 2, 1]] for layer, kept_HR in ascending.items()}
    logits, weights = [], []
    for name, kept in (("ascending", ascending), ("shuffled", shuffled)):
        plan = Plan({}, sizes, sizes._replace(head_k_dim=5), kept)
        write_pruned(checkpoint, plan, tmp_path / name, dense="tiny")
        logits.append(load(tmp_path / name)(tokens).logits)
        weights.append(tensors_of(tmp_path / name)["model.layers.0.attn.q_proj.weight"])
    torch.testing.assert_close(*logits, rtol=1e-8, atol=1e-8)
    assert not torch.equal(*weights)


@pytest.mark.parametrize("keep", [1, 7])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(tiny_folder, pruned, model_type, keep):
    model, tokens = load(pruned(tiny_folder(model_type), keep)), draw_tokens(2, 76)
    whole = model(tokens, use_cache=False).logits
    result = model(tokens[:, :70], use_cache=True)
    logits = [result.logits]
    for step in range(70, 76):
        result = model(tokens[:, step : step + 1], past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-6, atol=1e-6)
    generated = model.generate(tokens[:, :9], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = tokens[:, :9]
    for _ in range(5):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


@torch.no_grad()
def test_tied_sixteen_bit_models_are_sliced_as_they_are(tmp_path, pruned):
    model = build("delta_net", tie_word_embeddings=True).bfloat16()
    source = save(model, tmp_path / "source")
    target = pruned(source, 3)
    before, after = tensors_of(source), tensors_of(target)
    assert "lm_head.weight" not in before
    kept = kept_channels(target)
    for name, tensor in after.items():
        assert tensor.dtype == torch.bfloat16
        parts = name.split(".")
        if parts[-2] in ("q_proj", "k_proj", "q_conv1d", "k_conv1d"):
            rows = [16 * head + channel for head, row in enumerate(kept[int(parts[2])].tolist()) for channel in row]
            assert torch.equal(tensor, before[name][rows])
        else:
            assert torch.equal(tensor, before[name])
    assert AutoModelForCausalLM.from_pretrained(target, dtype="auto").dtype == torch.bfloat16

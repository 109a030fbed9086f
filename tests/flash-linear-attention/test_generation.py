"""Decoding with a state, by whatever name the installed transformers passes it; and models without flash-attn."""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import fla.layers.attn
import fla_torch
import pytest
import torch
from fla.models.modeling_utils import FLAForCausalLM
from tiny_models import FAMILIES, build, draw_tokens
from transformers import GenerationMixin

HAS_CACHE = "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
# Only what does not touch our backend: fla's own mixers stand for any kernel.
ALONE = """
import sys, warnings
warnings.simplefilter("ignore")
import fla, fla_torch
import fla.layers.attn as attn
from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from fla.modules.causal_conv1d import ops
before = ops.causal_conv1d_fwd
attn.flash_attn_func = None
fla_torch.mend()
assert not fla_torch.is_enabled()
assert ops.causal_conv1d_fwd is before
model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(
    hidden_size=32, num_heads=2, head_dim=8, num_hidden_layers=2, intermediate_size=32, vocab_size=9,
    attn={"layers": [1], "num_heads": 2},
))
assert type(model.model.layers[1].attn).__name__ == "Attention"
"""


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_each_step_reads_one_token_and_the_state(model_type):
    model, prompt = build(model_type), draw_tokens(2, 9)
    seen = []

    def look(module, args, kwargs):
        seen.append((kwargs["input_ids"].shape[1], kwargs["past_key_values"]))

    # The inner model is given the state under fla's name for it.
    with model.model.register_forward_pre_hook(look, with_kwargs=True), warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        generated = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert [length for length, _ in seen] == [9, 1, 1, 1, 1]
    assert all(state.get_seq_length() == 13 for _, state in seen[1:])
    expected = prompt
    for _ in range(5):
        expected = torch.cat([expected, model(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, expected)


@pytest.mark.skipif(not HAS_CACHE, reason="the installed transformers passes the state as past_key_values alone")
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_models_take_the_state_under_both_names(model_type):
    model, tokens = build(model_type), draw_tokens(2, 6)
    expected = model(tokens, use_cache=False).logits[:, -1]
    for whole in (model, model.model):
        for name in ("cache", "past_key_values"):
            state = whole(tokens[:, :5], use_cache=True)["cache"]
            output = whole(tokens[:, 5:], use_cache=True, **{name: state})[0][:, -1]
            found = output if whole is model else model.lm_head(output)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_mending_again_changes_nothing():
    before = FLAForCausalLM.forward, GenerationMixin.prepare_inputs_for_generation, fla.layers.attn.flash_attn_func
    fla_torch.mend()
    fla_torch.enable()
    after = FLAForCausalLM.forward, GenerationMixin.prepare_inputs_for_generation, fla.layers.attn.flash_attn_func
    assert after == before


def test_mending_leaves_kernels_as_they_are_and_builds_softmax_layers_without_flash_attn():
    path = str(Path(fla_torch.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{ALONE}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

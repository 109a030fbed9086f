"""The Gated DeltaNet models of transformers on a CPU, where they call fla's operators because fla is installed.

Their own PyTorch form of the operators, which they keep for machines without fla, is what they are compared with.
"""

import importlib
import inspect
import os
import subprocess
import sys

import pytest
import torch
import transformers
from packaging.version import Version

FROM_FLA = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.15"), reason="the installed transformers calls its own on a CPU"
)
SIZES = dict(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=6, initializer_range=0.2, layer_types=["linear_attention", "full_attention"],
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
MODELS = {
    "qwen3_next": ("Qwen3Next", dict(head_dim=8) | EXPERTS),
    "qwen3_5": ("Qwen3_5", dict(head_dim=8)),
    "olmo_hybrid": ("OlmoHybrid", {}),
}


def modelling_module(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def build_model(name):
    """Return a tiny random model, float32, evaluation mode."""
    prefix, options = MODELS[name]
    configuration = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
    text = "Text" if name == "qwen3_5" else ""
    config = getattr(configuration, f"{prefix}{text}Config")(**SIZES | options)
    torch.manual_seed(0)
    return getattr(modelling_module(name), f"{prefix}ForCausalLM")(config).eval()


def draw_tokens(*shape):
    return torch.randint(1, 50, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def compare_with_own_operators(name):
    """Assert that fla's operators are called, and give the logits and the tokens of transformers' own."""
    module, model, ids = modelling_module(name), build_model(name), draw_tokens(2, 70)
    logits, generated = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
    operators = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    bound = {operator: getattr(module, operator) for operator in operators}
    for operator, function in bound.items():
        closure = inspect.getclosurevars(function).nonlocals
        assert closure["implementation"].__module__.startswith("fla."), operator
        setattr(module, operator, inspect.unwrap(function))
    try:
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), generated)
    finally:
        for operator, function in bound.items():
            setattr(module, operator, function)


@FROM_FLA
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_generate_equal_their_own_operators(name):
    compare_with_own_operators(name)


@pytest.mark.parametrize("name", MODELS)
def test_loss_reaches_every_parameter_of_the_mixer(name):
    model, ids = build_model(name).train(), draw_tokens(2, 70)
    model(ids, labels=ids).loss.backward()
    mixer = next(module for module in model.modules() if hasattr(module, "A_log"))
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(name):
    model, ids = build_model(name), draw_tokens(2, 20)
    whole = model(ids).logits
    prefill = model(ids[:, :15], use_cache=True)
    logits, cache = [prefill.logits], prefill.past_key_values
    for t in range(15, 20):
        logits.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-4)


@FROM_FLA
def test_models_that_took_hold_of_fla_before_find_the_backend_too():
    program = """
import test_transformers_models as this, fla_torch
for name in this.MODELS:
    this.modelling_module(name)
fla_torch.enable()
for name in this.MODELS:
    this.compare_with_own_operators(name)
print("same")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert process.stdout.strip() == "same", process.stderr

"""fla's preconditioned delta rules on a CPU: against fla's own definitions, and its models against themselves by steps.

Shapes: B rows, T tokens, H key heads, W value heads, K key and V value channels of a head.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fla.models import (
    PrecondGatedDeltaNetConfig,
    PrecondGatedDeltaNetForCausalLM,
    PrecondKDAConfig,
    PrecondKDAForCausalLM,
)
from fla.ops.precond_gated_delta_rule import (
    chunk_precond_gated_delta_rule,
    fused_recurrent_precond_gated_delta_rule,
    naive_recurrent_precond_gated_delta_rule,
)
from fla.ops.precond_kda import chunk_precond_kda, fused_recurrent_precond_kda
from fla.ops.precond_kda.naive import naive_recurrent_precond_kda

B, T, H, W, K, V = 2, 9, 2, 4, 5, 3
GATED = pytest.mark.parametrize("operator", [chunk_precond_gated_delta_rule, fused_recurrent_precond_gated_delta_rule])
CHANNELS = pytest.mark.parametrize("operator", [chunk_precond_kda, fused_recurrent_precond_kda])
MODELS = [(PrecondGatedDeltaNetConfig, PrecondGatedDeltaNetForCausalLM), (PrecondKDAConfig, PrecondKDAForCausalLM)]


def draw(key_heads, decay_shape):
    generator = torch.Generator().manual_seed(0)
    shapes = dict(q=(B, T, key_heads, K), k=(B, T, key_heads, K), v=(B, T, W, V), g=decay_shape, beta=(B, T, W))
    shapes |= dict(g_atk=(B, T, key_heads), beta_atk=(B, T, key_heads))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tensors |= {name: -F.softplus(tensors[name]) for name in ("g", "g_atk")}
    return tensors | {name: tensors[name].sigmoid() for name in ("beta", "beta_atk")}


def states(key_heads):
    generator = torch.Generator().manual_seed(1)
    state, squares = (torch.randn(shape, generator=generator) for shape in ((B, W, K, V), (B, key_heads, K)))
    return dict(initial_state=state, initial_A_state=squares.square())


@pytest.mark.parametrize("scale", [None, torch.linspace(-1, 1, H)], ids=["default", "of heads"])
@GATED
def test_gated_operators_equal_the_definition(operator, scale):
    tensors, start = draw(H, (B, T, W)), states(H)
    options = dict(output_final_state=True, x=1.7, log_atk_scale=scale)
    found = operator(**tensors, **start, use_qk_l2norm_in_kernel=True, **options)
    expected = naive_recurrent_precond_gated_delta_rule(**tensors, **start, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@CHANNELS
def test_operators_of_channels_equal_the_definition(operator):
    tensors, start = draw(W, (B, T, W, K)), states(W)
    options = dict(output_final_state=True, log_atk_scale=torch.linspace(-1, 1, W))
    found = operator(**tensors, **start, use_qk_l2norm_in_kernel=False, **options)
    expected = naive_recurrent_precond_kda(**tensors, **start, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    normalised = tensors | {name: F.normalize(tensors[name], dim=-1) for name in "qk"}
    found = operator(**tensors, **start, use_qk_l2norm_in_kernel=True, **options)
    for one, other in zip(found, naive_recurrent_precond_kda(**normalised, **start, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@GATED
def test_packed_sequences_are_sequences_of_their_own(operator):
    tensors = draw(H, (B, T, W))
    packed = {name: tensor.flatten(0, 1)[None] for name, tensor in tensors.items()}
    lengths = torch.tensor([0, 4, 2 * T])
    output, state, squares = operator(**packed, cu_seqlens=lengths, output_final_state=True)
    for number, (begin, end) in enumerate(itertools.pairwise(lengths)):
        alone = operator(**{name: one[:, begin:end] for name, one in packed.items()}, output_final_state=True)
        found = (output[:, begin:end], state[number : number + 1], squares[number : number + 1])
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@GATED
def test_gradients_are_those_of_the_definition(operator):
    found, expected = (
        {name: tensor.clone().requires_grad_() for name, tensor in draw(H, (B, T, W)).items()} for _ in range(2)
    )
    operator(**found)[0].square().sum().backward()
    naive_recurrent_precond_gated_delta_rule(**expected)[0].square().sum().backward()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.grad, expected[name].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("options", [{}, {"safe_gate": True, "lower_bound": -5.0}], ids=["", "bounded"])
@pytest.mark.parametrize("config_class, model_class", MODELS)
@torch.no_grad()
def test_steps_through_the_cache_give_the_logits_of_one_pass(config_class, model_class, options):
    sizes = dict(hidden_size=32, num_heads=2, num_v_heads=4, head_dim=8, expand_v=0.75, num_hidden_layers=2)
    sizes |= dict(intermediate_size=32, vocab_size=64, initializer_range=0.3)
    torch.manual_seed(0)
    model, tokens = model_class(config_class(**sizes, **options)).eval(), torch.randint(64, (2, 70))
    result = model(tokens[:, :66], use_cache=True)
    logits = [result.logits]
    for step in range(66, 70):
        result = model(tokens[:, step : step + 1], past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), model(tokens).logits, rtol=1e-3, atol=1e-4)

"""fla's norms on a CPU against ``torch.nn.functional``, forward and backward.

Shapes: B batch, T tokens, D channels.
"""

import pytest
import torch
import torch.nn.functional as F
from fla.modules import FusedRMSNormGated, GroupNorm, L2Norm, LayerNorm, RMSNorm
from fla.modules.norm.fused_norm_gate import layer_norm_gated, rms_norm_gated, rms_norm_swish_gate_linear
from fla.modules.norm.l2norm import l2_norm
from fla.modules.norm.layernorm import group_norm, layer_norm, rms_norm, rms_norm_linear
from torch.testing import assert_close

B, T, D = 2, 5, 12
EPS = 1e-5


def draw(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def assert_same_values_and_gradients(actual, expected, leaves):
    assert_close(actual, expected)
    actual, expected = (result if isinstance(result, tuple) else (result,) for result in (actual, expected))

    def gradients_of(outputs):
        # Each output has its own direction, so that none can hide in the sum.
        return torch.autograd.grad(sum((n + output).sin().sum() for n, output in enumerate(outputs)), leaves)

    assert_close(gradients_of(actual), gradients_of(expected))


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("is_rms", [True, False])
def test_norm(is_rms, has_weight):
    x, weight, bias = draw((B, T, D), (D,), (D,))
    if not has_weight:
        weight = bias = None
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    if is_rms:
        actual = rms_norm(x, weight, bias, eps=EPS)
        expected = F.rms_norm(x, (D,), weight, EPS) + (0 if bias is None else bias)
    else:
        actual = layer_norm(x, weight, bias, eps=EPS)
        expected = F.layer_norm(x, (D,), weight, bias, EPS)
    assert_same_values_and_gradients(actual, expected, leaves)


@pytest.mark.parametrize("groups", [1, 3, 4])
@pytest.mark.parametrize("is_rms", [True, False])
def test_groups(is_rms, groups):
    x, weight, bias = draw((B, T, D), (D,), (D,))
    actual = group_norm(x, weight, bias, eps=EPS, is_rms_norm=is_rms, num_groups=groups)
    if is_rms:
        grouped = F.rms_norm(x.unflatten(-1, (groups, -1)), (D // groups,), eps=EPS)
        expected = grouped.flatten(-2) * weight + bias
    else:
        expected = F.group_norm(x.flatten(0, 1), groups, weight, bias, EPS).view_as(x)
    assert_same_values_and_gradients(actual, expected, [x, weight, bias])


@pytest.mark.parametrize("prenorm", [True, False])
def test_residual_is_added_before_and_handed_on(prenorm):
    x, residual, weight = draw((B, T, D), (B, T, D), (D,))
    actual = rms_norm(x, weight, None, residual=residual, eps=EPS, prenorm=prenorm)
    summed = x + residual
    expected = F.rms_norm(summed, (D,), weight, EPS)
    assert_same_values_and_gradients(actual, (expected, summed) if prenorm else expected, [x, residual, weight])


def test_residual_stream_in_float32_of_a_sixteen_bit_model():
    x, weight = draw((B, T, D), (D,), dtype=torch.bfloat16)
    output, stream = rms_norm(x, weight, None, eps=EPS, prenorm=True, residual_in_fp32=True)
    assert (output.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(stream, x.float())
    (output.float().sum() + stream.sum()).backward()
    wide_x, wide_weight = (leaf.detach().double().requires_grad_() for leaf in (x, weight))
    (F.rms_norm(wide_x, (D,), wide_weight, EPS).sum() + wide_x.sum()).backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert_close(x.grad, wide_x.grad.bfloat16())
    assert_close(weight.grad, wide_weight.grad.bfloat16())


def test_sixteen_bit_input_with_a_float32_residual():
    (x,), (residual,) = draw((B, T, D), dtype=torch.bfloat16), draw((B, T, D), dtype=torch.float32)
    output, stream = rms_norm(x, None, None, residual=residual, eps=EPS, prenorm=True)
    assert (output.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    dx, dresidual = torch.autograd.grad(output.float().sin().sum() + stream.sum(), [x, residual])
    assert (dx.dtype, dresidual.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(dx, dresidual.bfloat16())


@pytest.mark.parametrize("activation", ["swish", "silu", "sigmoid"])
@pytest.mark.parametrize("is_rms", [True, False])
def test_gated(is_rms, activation):
    x, gate, weight, bias = draw((B, T, D), (B, T, D), (D,), (D,))
    function = rms_norm_gated if is_rms else layer_norm_gated
    actual = function(x, gate, weight, bias, activation, eps=EPS)
    normed = F.rms_norm(x, (D,), weight, EPS) + bias if is_rms else F.layer_norm(x, (D,), weight, bias, EPS)
    expected = normed * (gate.sigmoid() if activation == "sigmoid" else F.silu(gate))
    assert_same_values_and_gradients(actual, expected, [x, gate, weight, bias])


def test_gated_with_a_residual():
    x, gate, residual, weight = draw((B, T, D), (B, T, D), (B, T, D), (D,))
    actual = rms_norm_gated(x, gate, weight, None, residual=residual, prenorm=True, eps=EPS)
    expected = F.rms_norm(x + residual, (D,), weight, EPS) * F.silu(gate)
    assert_same_values_and_gradients(actual, (expected, x + residual), [x, gate, residual, weight])


def test_followed_by_a_linear_map_in_one_function():
    x, gate, weight, linear, bias = draw((B, T, D), (B, T, D), (D,), (7, D), (7,))
    actual = rms_norm_linear(x, weight, None, linear, bias, eps=EPS)
    expected = F.linear(F.rms_norm(x, (D,), weight, EPS), linear, bias)
    assert_same_values_and_gradients(actual, expected, [x, weight, linear, bias])
    actual = rms_norm_swish_gate_linear(x, gate, weight, None, linear, bias, eps=EPS)
    expected = F.linear(F.rms_norm(x, (D,), weight, EPS) * F.silu(gate), linear, bias)
    assert_same_values_and_gradients(actual, expected, [x, gate, weight, linear, bias])


@pytest.mark.parametrize(
    "norm, functional",
    [
        (RMSNorm(D, eps=EPS), lambda x: F.rms_norm(x, (D,), eps=EPS)),
        (LayerNorm(D, eps=EPS), lambda x: F.layer_norm(x, (D,), eps=EPS)),
        (GroupNorm(3, D, eps=EPS), lambda x: F.group_norm(x.flatten(0, 1), 3, eps=EPS).view_as(x)),
        (L2Norm(eps=EPS), lambda x: x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules(norm, functional):
    (x,) = draw((B, T, D), dtype=torch.float32)
    assert_close(norm(x), functional(x))


def test_gated_module():
    x, gate = draw((B, T, 3, D), (B, T, 3, D), dtype=torch.float32)
    norm = FusedRMSNormGated(D, eps=EPS)
    assert_close(norm(x, gate), F.rms_norm(x, (D,), norm.weight, EPS) * F.silu(gate))


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_l2_norm(eps):
    (x,) = draw((B, T, D))
    expected = x / (x.square().sum(dim=-1, keepdim=True) + eps).sqrt()
    assert_same_values_and_gradients(l2_norm(x, eps), expected, [x])


def test_l2_norm_in_another_dtype():
    (x,) = draw((B, T, D), dtype=torch.bfloat16)
    output = l2_norm(x, output_dtype=torch.float32)
    assert output.dtype == torch.float32
    assert_close(output, F.normalize(x.float(), dim=-1), rtol=1e-6, atol=1e-6)
    output.sum().backward()
    assert x.grad.dtype == torch.bfloat16

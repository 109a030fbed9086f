"""fla's activations on a CPU against ``torch.nn.functional``, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from fla.modules.activations import logsigmoid, sigmoid, swiglu, swiglu_linear, swish
from torch.testing import assert_close

CASES = {
    "sigmoid": (sigmoid, torch.sigmoid, 1),
    "logsigmoid": (lambda x: logsigmoid(x, 16.0), lambda x: F.logsigmoid(x) / 16, 1),
    "swish": (swish, F.silu, 1),
    "swiglu": (swiglu, lambda x, y: F.silu(x) * y, 2),
}


def draw(count, shape=(3, 5, 8), dtype=torch.float64):
    generator = torch.Generator().manual_seed(count)
    return [(4 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for _ in range(count)]


def gradients_of(output, leaves):
    return torch.autograd.grad(output.sin().sum(), leaves)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    function, expected, arguments = CASES[name]
    leaves = draw(arguments)
    assert_close(function(*leaves), expected(*leaves))
    assert_close(gradients_of(function(*leaves), leaves), gradients_of(expected(*leaves), leaves))


@pytest.mark.parametrize("name", CASES)
def test_sixteen_bits_are_computed_in_thirty_two(name):
    function, expected, arguments = CASES[name]
    leaves = draw(arguments, dtype=torch.bfloat16)
    output = function(*leaves)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected(*(leaf.float() for leaf in leaves)).bfloat16())
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients_of(output, leaves))


def test_logsigmoid_and_swish_of_large_numbers():
    x = torch.tensor([-1e4, 1e4])
    assert_close(logsigmoid(x), torch.tensor([-1e4, 0.0]))
    assert_close(swish(x), torch.tensor([0.0, 1e4]))


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_swiglu_followed_by_a_linear_map(biased, frozen):
    x, y = draw(2)
    (weight,) = draw(1, (6, 8))
    weight.requires_grad_(not frozen)
    bias = draw(1, (6,))[0] if biased else None
    leaves = [leaf for leaf in (x, y, weight, bias) if leaf is not None and leaf.requires_grad]
    actual, expected = swiglu_linear(x, y, weight, bias), F.linear(F.silu(x) * y, weight, bias)
    assert_close(actual, expected)
    assert_close(gradients_of(actual, leaves), gradients_of(expected, leaves))

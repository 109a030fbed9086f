"""fla's short convolution on a CPU against ``torch.nn.functional.conv1d`` in float64 and autograd.

Shapes: B batch, N sequences, T tokens, D channels, W taps.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from fla.modules import ShortConvolution
from fla.modules.causal_conv1d.ops import causal_conv1d, causal_conv1d_update_states, compute_dh0_triton
from torch.testing import assert_close

D, W = 6, 4


def draw_inputs(B, T, *, bias=True, residual=True, state=True, dtype=torch.float64):
    """Return x, weight, bias, residual and initial state (None where unwanted), all leaves."""
    shapes = [(B, T, D), (D, W), (D,) if bias else None, (B, T, D) if residual else None, (B, D, W) if state else None]
    generator = torch.Generator().manual_seed(T)
    return [
        None if shape is None else torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in shapes
    ]


def reference_convolution(x, weight, bias, residual, state, activation):
    """Return the output and the last W inputs; the first of the W inputs in ``state`` has no tap left to meet."""
    before = x.new_zeros(x.shape[0], D, W) if state is None else state
    inputs_BDT = torch.cat([before, x.mT], dim=2)
    output = F.conv1d(inputs_BDT[:, :, 1:], weight[:, None], bias, groups=D).mT
    output = output if activation is None else F.silu(output)
    return output if residual is None else output + residual, inputs_BDT[:, :, -W:]


def gradients_of(outputs, leaves):
    loss = sum(output.sin().sum() for output in outputs)
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("present", [(False, False, False), (True, False, True), (True, True, True)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 9])
def test_outputs_states_and_gradients(tokens, present, activation):
    bias, residual, state = present
    leaves = draw_inputs(2, tokens, bias=bias, residual=residual, state=state)
    outputs = causal_conv1d(*leaves, output_final_state=True, activation=activation)
    expected = reference_convolution(*leaves, activation)
    assert_close(outputs, expected)
    assert_close(gradients_of(outputs, leaves), gradients_of(expected, leaves))


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_are_as_if_alone(state, dtype):
    lengths = [1, 5, 2, 4]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    x, weight, bias, residual, _ = draw_inputs(1, sum(lengths))
    states = torch.randn(len(lengths), D, W, dtype=torch.float64, requires_grad=True) if state else None
    leaves = [x, weight, bias, residual, states]
    outputs = causal_conv1d(*leaves, output_final_state=True, activation="silu", cu_seqlens=bounds)
    alone = [
        reference_convolution(
            x[:, start:end], weight, bias, residual[:, start:end], states[[n]] if state else None, "silu"
        )
        for n, (start, end) in enumerate(itertools.pairwise(bounds))
    ]
    expected = (torch.cat([output for output, _ in alone], dim=1), torch.cat([last for _, last in alone]))
    assert_close(outputs, expected)
    assert_close(gradients_of(outputs, leaves), gradients_of(expected, leaves))


def test_gradients_are_those_of_finite_differences():
    leaves = draw_inputs(2, 5)
    assert torch.autograd.gradcheck(
        lambda *inputs: causal_conv1d(*inputs, output_final_state=True, activation="silu"), leaves
    )


def test_channels_of_heads_are_flattened():
    x, weight, bias, _, _ = draw_inputs(2, 5)
    by_head = causal_conv1d(x.unflatten(-1, (2, 3)), weight, bias, activation="silu")[0]
    assert_close(by_head, causal_conv1d(x, weight, bias, activation="silu")[0].unflatten(-1, (2, 3)))


@pytest.mark.parametrize("final_state_is_used", [False, True])
@pytest.mark.parametrize("bounds", [None, torch.tensor([0, 2, 9])])
def test_gradient_of_the_initial_state_alone(final_state_is_used, bounds):
    sequences = 1 if bounds is None else 2
    x, weight, bias, _, _ = draw_inputs(1, 9)
    state = torch.randn(sequences, D, W, dtype=torch.float64, requires_grad=True)
    output, last = causal_conv1d(x, weight, bias, None, state, True, "silu", cu_seqlens=bounds)
    linear, _ = causal_conv1d(x, weight, bias, None, state, cu_seqlens=bounds)
    dy, dht = torch.randn_like(output), torch.randn_like(last)
    loss = (output * dy).sum() + ((last * dht).sum() if final_state_is_used else 0)
    gradient = compute_dh0_triton(
        dy, linear.detach(), weight.detach(), state.detach(), "silu", bounds, dht if final_state_is_used else None
    )
    assert_close(gradient, torch.autograd.grad(loss, state)[0])


def test_states_of_rows_without_a_batch_axis():
    x = torch.randn(7, D)
    states = causal_conv1d_update_states(x, W, cu_seqlens=torch.tensor([0, 2, 7]))
    assert_close(states, torch.stack([F.pad(x[:2].mT, (2, 0)), x[3:].mT]))


def test_sixteen_bits_are_convolved_in_thirty_two():
    leaves = [leaf.detach() for leaf in draw_inputs(2, 9, dtype=torch.bfloat16)]
    output, last = causal_conv1d(*leaves, output_final_state=True, activation="silu")
    expected, inputs = reference_convolution(*(leaf.double() for leaf in leaves), "silu")
    assert (output.dtype, last.dtype) == (torch.bfloat16, torch.bfloat16)
    assert_close(output, expected.bfloat16())
    assert torch.equal(last.double(), inputs)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefill", [0, 1, 5])
def test_steps_continue_a_prefill(prefill, bias, activation):
    torch.manual_seed(0)
    layer = ShortConvolution(D, W, bias=bias, activation=activation)
    x, residual = torch.randn(3, 9, D), torch.randn(3, 9, D)
    whole, last = layer(x, residual=residual, output_final_state=True)
    pieces, cache = [], None
    with torch.no_grad():
        if prefill:
            output, cache = layer(x[:, :prefill], residual=residual[:, :prefill], output_final_state=True)
            pieces.append(output)
        for t in range(prefill, 9):
            step = slice(t, t + 1)
            output, cache = layer(x[:, step], residual=residual[:, step], cache=cache, output_final_state=True)
            pieces.append(output)
    assert_close(torch.cat(pieces, dim=1), whole.detach())
    assert torch.equal(cache, last)


def test_a_step_of_packed_sequences_writes_the_cache_in_place():
    torch.manual_seed(0)
    layer = ShortConvolution(D, W)
    x, cache = torch.randn(1, 3, D), torch.randn(3, D, W)
    expected, last = layer(x.transpose(0, 1), cache=cache, output_final_state=True)
    with torch.no_grad():
        output, returned = layer(x, cache=cache, output_final_state=True, cu_seqlens=torch.arange(4))
    assert_close(output, expected.detach().transpose(0, 1))
    assert returned is cache
    assert torch.equal(cache, last)

"""The chunked and the recurrent delta rule against the definition in float64, and their gradients."""

import pytest
import torch
from delta_rule_reference import draw_inputs, reference_delta_rule, relative_error
from fla_torch import segment
from fla_torch.delta_rule import chunked_delta_rule, recurrent_delta_rule
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-5


def run_chunked(query, key, value, beta, log_decay, state, chunk_size=64):
    return chunked_delta_rule(
        query, key, value, beta, log_decay, scale=0.5, initial_state_BWKV=state, chunk_size=chunk_size
    )


def run_recurrent(query, key, value, beta, log_decay, state):
    decay = None if log_decay is None else log_decay[..., None, None]
    return recurrent_delta_rule(query, key, value, beta, decay, scale=0.5, initial_state_BWKV=state)


BOTH = pytest.mark.parametrize("run", [run_chunked, run_recurrent])


def assert_follows_definition(result, inputs):
    query, key, value, beta, log_decay, state = inputs
    expected = reference_delta_rule(query, key, value, beta, log_decay, scale=0.5, initial_state=state)
    for actual, wanted in zip(result, expected, strict=True):
        assert actual.shape == wanted.shape
        assert relative_error(actual, wanted) < TOLERANCE


@BOTH
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 130])
def test_follows_the_definition(run, gated, tokens):
    inputs = draw_inputs(tokens, B=2, T=tokens, H=2, W=4, K=7, V=5, gated=gated)
    assert_follows_definition(run(*inputs), inputs)


@BOTH
@pytest.mark.parametrize("gated", [False, True])
def test_starts_from_zeros_without_a_state(run, gated):
    inputs = draw_inputs(1, T=65, K=5, V=8, gated=gated)
    zeros = torch.zeros_like(inputs[-1])
    assert_follows_definition(run(*inputs[:-1], None), (*inputs[:-1], zeros))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000), B=st.integers(1, 2), T=st.integers(1, 70), H=st.integers(1, 2), G=st.integers(1, 3),
    K=st.integers(1, 9), V=st.integers(1, 9), gated=st.booleans(), chunk_size=st.sampled_from([1, 16, 32, 64, 100]),
)  # fmt: skip
def test_any_shape_and_chunk_size(seed, B, T, H, G, K, V, gated, chunk_size):
    inputs = draw_inputs(seed, B=B, T=T, H=H, W=H * G, K=K, V=V, gated=gated)
    assert_follows_definition(run_chunked(*inputs, chunk_size=chunk_size), inputs)
    assert_follows_definition(run_recurrent(*inputs), inputs)


@BOTH
@pytest.mark.parametrize("every", [1, 3])
def test_strong_decay_neither_overflows_nor_loses_precision(run, every):
    inputs = draw_inputs(3, T=130, H=1, W=2, K=7, V=6)
    inputs[4][:, ::every] = -30.0
    assert_follows_definition(run(*inputs), inputs)


def test_gradients_stay_finite_under_strong_decay():
    inputs = draw_inputs(4, T=130, W=2, K=4, V=4)
    inputs[4].fill_(-30.0)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    output, state = run_chunked(*leaves)
    gradients = torch.autograd.grad(output.sum() + state.sum(), leaves)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("run", [lambda *inputs: run_chunked(*inputs, chunk_size=2), run_recurrent])
def test_gradients_of_every_input_are_those_of_finite_differences(run, gated):
    inputs = draw_inputs(5, B=2, T=5, H=1, W=2, K=3, V=2, gated=gated, dtype=torch.float64)
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("few_launches", [False, True])
@pytest.mark.parametrize("decay", [None, "weak", "strong"])
def test_chunks_and_recurrence_have_the_same_gradients(decay, few_launches, monkeypatch):
    # What runs on CUDA is computed here too.
    monkeypatch.setattr(segment, "_launches_are_dear", lambda _: few_launches)
    inputs = draw_inputs(6, B=2, T=130, H=2, W=4, K=5, V=7, gated=decay is not None, dtype=torch.float64)
    if decay == "strong":
        inputs[4][:, ::3] = -20.0
        inputs[4][:, 70:90] = -50.0
    leaves = [tensor.requires_grad_() for tensor in inputs if tensor is not None]

    def gradients_of(run):
        output, state = run(*inputs)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        return torch.autograd.grad((output * weights).sum() + state.square().sum(), leaves)

    for chunked, recurrent in zip(gradients_of(run_chunked), gradients_of(run_recurrent), strict=True):
        torch.testing.assert_close(chunked, recurrent, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("few_launches", [False, True])
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_a_key_that_repeats_keeps_its_precision(strength, few_launches, monkeypatch):
    # The powers of L grow beyond all bounds here, while (I + L)^-1 stays small.
    monkeypatch.setattr(segment, "_launches_are_dear", lambda _: few_launches)
    inputs = draw_inputs(9, T=130, H=1, W=2, K=7, V=6)
    inputs[1].copy_(inputs[1][:, :1].expand_as(inputs[1]))
    inputs[3].fill_(strength)
    assert_follows_definition(run_chunked(*inputs), inputs)


def test_inputs_of_16_bits_are_widened_and_the_state_stays_wide():
    inputs = draw_inputs(10, T=70, K=8, V=8)
    narrow = [tensor.bfloat16() for tensor in inputs[:3]]
    output, state = run_chunked(*narrow, *inputs[3:])
    expected_output, expected_state = run_chunked(*(tensor.float() for tensor in narrow), *inputs[3:])
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(output, expected_output.bfloat16())
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("gated", [False, True])
def test_chunks_keep_their_precision_over_a_long_sequence(gated):
    inputs = draw_inputs(8, T=2048, K=16, V=16, gated=gated)
    assert_follows_definition(run_chunked(*inputs), inputs)

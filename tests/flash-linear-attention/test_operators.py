"""fla's public delta-rule operators on a CPU, with each of their options, against the definition in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from delta_rule_reference import draw_inputs, reference_delta_rule, relative_error
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

SHAPES = dict(B=2, T=67, H=2, K=6, V=5)
TOLERANCE = 1e-5

UNGATED = pytest.mark.parametrize("operator", [chunk_delta_rule, fused_recurrent_delta_rule])
GATED = pytest.mark.parametrize("operator", [chunk_gated_delta_rule, fused_recurrent_gated_delta_rule])
ALL = pytest.mark.parametrize(
    "operator", [chunk_delta_rule, fused_recurrent_delta_rule, chunk_gated_delta_rule, fused_recurrent_gated_delta_rule]
)


def is_gated(operator):
    return operator in (chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)


def draw_arguments(operator, seed=0, dtype=torch.float32, **shapes):
    """Return the operator's tensors by name, and the initial state."""
    shapes = SHAPES | {"W": 4 if is_gated(operator) else 2} | shapes
    query, key, value, beta, log_decay, state = draw_inputs(seed, **shapes, gated=is_gated(operator), dtype=dtype)
    arguments = dict(q=query, k=key, v=value, beta=beta)
    if log_decay is not None:
        arguments["g"] = log_decay
    return arguments, state


def expect(arguments, state=None, scale=None):
    key = arguments["k"]
    return reference_delta_rule(
        arguments["q"], key, arguments["v"], arguments["beta"], arguments.get("g"),
        scale=key.shape[-1] ** -0.5 if scale is None else scale, initial_state=state,
    )  # fmt: skip


def assert_equal_to(expected, result):
    for actual, wanted in zip(result, expected, strict=True):
        assert actual.shape == wanted.shape
        assert relative_error(actual, wanted) < TOLERANCE


def assert_same(result, expected):
    for actual, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


@ALL
@pytest.mark.parametrize("tokens", [1, 67])
def test_output_and_final_state(operator, tokens):
    arguments, state = draw_arguments(operator, T=tokens)
    result = operator(**arguments, initial_state=state, output_final_state=True)
    assert_equal_to(expect(arguments, state), result)
    assert result[1].dtype == torch.float32


@ALL
def test_scale_and_absent_states(operator):
    arguments, _ = draw_arguments(operator)
    output, state = operator(**arguments, scale=0.7)
    assert state is None
    assert_equal_to(expect(arguments, scale=0.7)[:1], (output,))


@ALL
def test_normalises_queries_and_keys(operator):
    arguments, state = draw_arguments(operator)
    arguments["k"] = arguments["k"] * 3
    result = operator(**arguments, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    for name in "qk":
        squares = arguments[name].double().square().sum(dim=-1, keepdim=True)
        arguments[name] = arguments[name].double() / (squares + 1e-6).sqrt()
    assert_equal_to(expect(arguments, state), result)


@GATED
def test_state_with_value_channels_first(operator):
    arguments, state = draw_arguments(operator)
    options = dict(initial_state=state.mT.contiguous(), output_final_state=True, state_v_first=True)
    output, final_state = operator(**arguments, **options)
    assert_equal_to(expect(arguments, state), (output, final_state.mT))


@GATED
@pytest.mark.parametrize("biased", [True, False])
def test_computes_the_gate_inside(operator, biased):
    arguments, state = draw_arguments(operator)
    raw = torch.randn(arguments["g"].shape)
    A_log, dt_bias = torch.randn(4), torch.randn(4) if biased else None
    result = operator(
        **arguments | {"g": raw}, initial_state=state, output_final_state=True,
        use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
    )  # fmt: skip
    shifted = raw.double() + (dt_bias.double() if biased else 0)
    arguments["g"] = -A_log.double().exp() * torch.log1p(shifted.exp())
    assert_equal_to(expect(arguments, state), result)


@GATED
@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_computes_the_sigmoid_of_beta_inside(operator, allow_neg_eigval):
    arguments, state = draw_arguments(operator)
    raw = torch.randn(arguments["beta"].shape)
    result = operator(
        **arguments | {"beta": raw}, initial_state=state, output_final_state=True,
        use_beta_sigmoid_in_kernel=True, allow_neg_eigval=allow_neg_eigval,
    )  # fmt: skip
    arguments["beta"] = (2 if allow_neg_eigval else 1) / (1 + (-raw.double()).exp())
    assert_equal_to(expect(arguments, state), result)


@pytest.mark.parametrize("operator", [fused_recurrent_delta_rule, fused_recurrent_gated_delta_rule])
def test_beta_is_one_where_absent(operator):
    arguments, _ = draw_arguments(operator, T=5, W=2)
    del arguments["beta"]
    output, _ = operator(**arguments)
    assert_equal_to(expect(arguments | {"beta": torch.ones(2, 5, 2)})[:1], (output,))


@pytest.mark.parametrize("operator", [fused_recurrent_delta_rule, fused_recurrent_gated_delta_rule])
def test_beta_of_each_value_channel(operator):
    arguments, state = draw_arguments(operator, T=7)
    beta = torch.rand(arguments["v"].shape)
    output, _ = operator(**arguments | {"beta": beta}, initial_state=state)
    for channel in range(SHAPES["V"]):
        # Value channels do not meet in the recurrence: each is a delta rule of its own.
        alone = arguments | {"v": arguments["v"][..., [channel]], "beta": beta[..., channel]}
        assert_equal_to(expect(alone, state[..., [channel]])[:1], (output[..., [channel]],))


def test_decay_of_each_key_and_value_channel():
    arguments, state = draw_arguments(fused_recurrent_gated_delta_rule, T=3, B=1, H=1, W=1)
    key_decay, value_decay = -torch.rand(1, 3, 1, 6), -torch.rand(1, 3, 1, 5)
    output, final_state = fused_recurrent_gated_delta_rule(
        **arguments, gk=key_decay, gv=value_decay, initial_state=state, output_final_state=True
    )
    q, k, v, beta, g = (arguments[name][0, :, 0].double() for name in ("q", "k", "v", "beta", "g"))
    expected_state, rows = state[0, 0].double(), []
    for t in range(3):
        decay = torch.outer(key_decay[0, t, 0].double().exp(), value_decay[0, t, 0].double().exp()) * g[t].exp()
        expected_state = expected_state * decay
        expected_state = expected_state + torch.outer(k[t], beta[t] * (v[t] - expected_state.T @ k[t]))
        rows.append(expected_state.T @ q[t] * 6**-0.5)
    assert_equal_to((torch.stack(rows), expected_state), (output[0, :, 0], final_state[0, 0]))


@ALL
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [[1, 64, 3, 65, 1], [1, 1, 1]])
def test_packed_sequences_are_as_if_alone(operator, dtype, lengths):
    arguments, states = draw_arguments(operator, B=1, T=sum(lengths))
    states = torch.randn(len(lengths), *states.shape[1:])
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    output, final_states = operator(**arguments, initial_state=states, output_final_state=True, cu_seqlens=bounds)
    for n, (start, end) in enumerate(itertools.pairwise(bounds)):
        piece = {name: tensor[:, start:end] for name, tensor in arguments.items()}
        alone = operator(**piece, initial_state=states[[n]], output_final_state=True)
        assert_same((output[:, start:end], final_states[[n]]), alone)


@ALL
def test_two_pieces_are_one(operator):
    arguments, state = draw_arguments(operator, T=100)
    whole = operator(**arguments, initial_state=state, output_final_state=True)
    outputs = []
    for piece in (slice(0, 70), slice(70, 100)):
        tensors = {name: tensor[:, piece] for name, tensor in arguments.items()}
        output, state = operator(**tensors, initial_state=state, output_final_state=True)
        outputs.append(output)
    assert_same((torch.cat(outputs, dim=1), state), whole)


@ALL
def test_sixteen_bits_in_and_out_with_a_float32_state(operator):
    arguments, state = draw_arguments(operator)
    arguments = {name: tensor.bfloat16() for name, tensor in arguments.items()}
    output, final_state = operator(**arguments, initial_state=state, output_final_state=True)
    assert (output.dtype, final_state.dtype) == (torch.bfloat16, torch.float32)
    expected_output, expected_state = expect(arguments, state)
    assert relative_error(final_state, expected_state) < TOLERANCE
    assert relative_error(output, expected_output) < 2**-8


@ALL
def test_autocast_changes_nothing(operator):
    arguments, state = draw_arguments(operator)
    expected = operator(**arguments, initial_state=state, output_final_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = operator(**arguments, initial_state=state, output_final_state=True)
    for actual, wanted in zip(result, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("operator", [chunk_delta_rule, fused_recurrent_delta_rule, chunk_gated_delta_rule])
def test_gradients_are_those_of_the_definition(operator):
    arguments, state = draw_arguments(operator, T=70, dtype=torch.float64)
    raw = {name: tensor.clone().requires_grad_() for name, tensor in (arguments | {"initial_state": state}).items()}
    output, final_state = operator(**raw, output_final_state=True, use_qk_l2norm_in_kernel=True)
    gradients = torch.autograd.grad(output.sin().sum() + final_state.cos().sum(), list(raw.values()))

    normal = {name: raw[name] / (raw[name].square().sum(-1, keepdim=True) + 1e-6).sqrt() for name in "qk"}
    output, final_state = differentiable_reference(**raw | normal)
    expected = torch.autograd.grad(output.sin().sum() + final_state.cos().sum(), list(raw.values()))
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-11)


def differentiable_reference(q, k, v, beta, initial_state, g=None):
    """The definition over all rows and heads at once, so that autograd passes through it quickly."""
    groups = v.shape[2] // k.shape[2]
    q, k = (tensor.repeat_interleave(groups, dim=2) for tensor in (q, k))
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        if g is not None:
            state = state * g[:, t, :, None, None].exp()
        update = beta[:, t, :, None] * (v[:, t] - torch.einsum("bwkv,bwk->bwv", state, k[:, t]))
        state = state + torch.einsum("bwk,bwv->bwkv", k[:, t], update)
        outputs.append(torch.einsum("bwkv,bwk->bwv", state, q[:, t]) * q.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), state


def test_gradients_reach_the_parameters_of_the_gate():
    arguments, _ = draw_arguments(chunk_gated_delta_rule, dtype=torch.float64)
    parameters = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss_inside():
        return (
            chunk_gated_delta_rule(**arguments, use_gate_in_kernel=True, A_log=parameters[0], dt_bias=parameters[1])[0]
            .sin()
            .sum()
        )

    def loss_outside():
        decay = -parameters[0].exp() * F.softplus(arguments["g"] + parameters[1])
        return chunk_gated_delta_rule(**arguments | {"g": decay})[0].sin().sum()

    inside, outside = (torch.autograd.grad(loss(), parameters) for loss in (loss_inside, loss_outside))
    torch.testing.assert_close(inside, outside)


@ALL
def test_packing_takes_one_row(operator):
    arguments, _ = draw_arguments(operator, B=2, T=4)
    with pytest.raises(ValueError, match="batch size"):
        operator(**arguments, cu_seqlens=torch.tensor([0, 2, 4]))


@ALL
@pytest.mark.parametrize("lengths", [[2, 2], [1, 1]])
def test_packing_takes_a_state_for_each_sequence(operator, lengths):
    arguments, state = draw_arguments(operator, B=1, T=sum(lengths))
    with pytest.raises(ValueError, match="initial states"):
        operator(**arguments, initial_state=state, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))


@GATED
def test_negative_eigenvalues_need_the_sigmoid_inside(operator):
    arguments, _ = draw_arguments(operator, T=4)
    with pytest.raises(ValueError, match="use_beta_sigmoid_in_kernel"):
        operator(**arguments, allow_neg_eigval=True)


def test_context_parallelism_is_refused():
    arguments, _ = draw_arguments(chunk_gated_delta_rule, T=4)
    with pytest.raises(ValueError, match="context parallelism"):
        chunk_gated_delta_rule(**arguments, cp_context=object())

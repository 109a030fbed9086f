"""On a GPU: the backend against fla's own Triton kernels, through the same functions of fla, on the same tensors.

One shape an operator: each new one costs Triton another round of autotuning.
"""

import fla_torch
import pytest
import torch
from delta_rule_reference import draw_inputs, relative_error
from fla.modules.causal_conv1d.ops import causal_conv1d
from fla.modules.fused_cross_entropy import cross_entropy_loss
from fla.modules.norm.fused_norm_gate import rms_norm_gated
from fla.modules.rotary import rotary_embedding
from fla.ops.common import chunk_o
from fla.ops.delta_rule import chunk_delta_rule, fused_recurrent_delta_rule
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

pytestmark = pytest.mark.gpu

# fla's kernels round the operands of each matrix product to 16 bits; in 32 bits only the order of sums differs.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 2e-4}


def run(function, leaves):
    """Return the outputs of ``function(*leaves)`` and the gradients of the leaves that want one."""
    outputs = [output for output in function(*leaves) if output is not None]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    if not wanted:
        return outputs
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    directions = [
        torch.randn(output.shape, generator=generator, device=output.device).to(output.dtype) for output in outputs
    ]
    return [*outputs, *torch.autograd.grad(outputs, wanted, directions)]


def assert_backend_equals_kernels(function, leaves, dtype):
    expected = run(function, leaves)
    fla_torch.enable(cuda=True)
    try:
        actual = run(function, leaves)
    finally:
        fla_torch.enable()
    for ours, kernels in zip(actual, expected, strict=True):
        assert (ours.dtype, ours.shape) == (kernels.dtype, kernels.shape)
        assert relative_error(ours, kernels) < TOLERANCE[dtype]


def draw_leaves(dtype, *, gated, gradients=True):
    """Return query, key, value, beta, log decay if gated, and a float32 initial state, on the GPU."""
    query, key, value, beta, log_decay, state = draw_inputs(
        0, B=2, T=130, H=2, W=4 if gated else 2, K=64, V=64, gated=gated, device="cuda"
    )
    leaves = [tensor.to(dtype) for tensor in (query, key, value, beta)]
    leaves += [log_decay, state] if gated else [state]
    return [leaf.requires_grad_(gradients) for leaf in leaves]


@pytest.mark.parametrize("operator, dtype", [
    (chunk_delta_rule, torch.bfloat16),
    (fused_recurrent_delta_rule, torch.float32),
])  # fmt: skip
def test_delta_rule(operator, dtype):
    def function(query, key, value, beta, state):
        return operator(
            query, key, value, beta,
            initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    assert_backend_equals_kernels(function, draw_leaves(dtype, gated=False), dtype)


@pytest.mark.parametrize("operator, dtype", [
    (chunk_gated_delta_rule, torch.bfloat16),
    (fused_recurrent_gated_delta_rule, torch.float32),
])  # fmt: skip
def test_gated_delta_rule(operator, dtype):
    A_log, dt_bias = torch.linspace(-1, 1, 4, device="cuda"), torch.linspace(-2, 0, 4, device="cuda")

    def function(query, key, value, beta, gate, state):
        return operator(
            query, key, value, g=gate, beta=beta, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, A_log=A_log, dt_bias=dt_bias,
            use_beta_sigmoid_in_kernel=True, allow_neg_eigval=True, state_v_first=True,
        )  # fmt: skip

    # fla has no backward of the recurrent kernel, and refuses that of the chunked one under some Tritons on Hopper.
    is_refused = chunk_o.IS_NVIDIA_HOPPER and chunk_o.TRITON_ABOVE_3_4_0 and not chunk_o.TRITON_ABOVE_3_7_1
    gradients = operator is chunk_gated_delta_rule and not is_refused
    leaves = draw_leaves(dtype, gated=True, gradients=gradients)
    assert_backend_equals_kernels(function, leaves, dtype)


@pytest.mark.parametrize("packed", [False, True])
def test_convolution(packed):
    bounds = torch.tensor([0, 1, 65, 130], device="cuda") if packed else None
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 130, 96), (96, 4), (96,), (1, 130, 96), (3 if packed else 1, 96, 4)]
    leaves = [torch.randn(shape, generator=generator, device="cuda").requires_grad_() for shape in shapes]

    def function(x, weight, bias, residual, state):
        output, final_state = causal_conv1d(x, weight, bias, residual, state, True, "silu", cu_seqlens=bounds)
        # The first of the W inputs in a state is never read again; fla's kernel gives it no gradient, autograd does.
        return output, final_state[..., 1:]

    assert_backend_equals_kernels(function, leaves, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_rms_norm(dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, 33, 4, 64), (2, 33, 4, 64), (64,)]
    leaves = [torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_() for shape in shapes]
    assert_backend_equals_kernels(lambda x, gate, weight: [rms_norm_gated(x, gate, weight, None)], leaves, dtype)


def test_cross_entropy():
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(70, 300, generator=generator, device="cuda").requires_grad_()
    target = torch.randint(300, (70,), generator=generator, device="cuda")
    target[::7] = -100
    options = dict(label_smoothing=0.1, logit_scale=2.0, lse_square_scale=0.01, logit_softcapping=3.0)
    assert_backend_equals_kernels(
        lambda logits: cross_entropy_loss(logits, target, **options)[:1], [logits], torch.float32
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_with_left_padding(interleaved):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 33, 3, 64, generator=generator, device="cuda").requires_grad_()
    angles = torch.arange(64, device="cuda")[:, None] * 10.0 ** -torch.linspace(0, 3, 16, device="cuda")
    offsets = torch.tensor([-3, 20], device="cuda")
    assert_backend_equals_kernels(
        lambda x: [rotary_embedding(x, angles.cos(), angles.sin(), interleaved, seqlen_offsets=offsets)],
        [x],
        torch.float32,
    )

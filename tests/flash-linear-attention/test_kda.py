"""Kimi Delta Attention on a CPU: fla's operators against a float64 loop, and its model against itself step by step.

Shapes: B rows, T tokens, H key heads, W value heads, K key and V value channels of a head.
"""

import pytest
import torch
import torch.nn.functional as F
from fla.models import KDAConfig, KDAForCausalLM
from fla.ops.kda import chunk_kda, fused_recurrent_kda

B, T, H, W, K, V = 2, 9, 2, 4, 5, 3
OPERATORS = pytest.mark.parametrize("operator", [chunk_kda, fused_recurrent_kda])


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, W, V), g=(B, T, W, K), beta=(B, T, W))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def loop(q, k, v, log_decay, beta, state=None):
    """The definition, head by head and token by token, in float64; q and k are normalised here."""
    q, k, v, log_decay, beta = (tensor.double() for tensor in (q, k, v, log_decay, beta))
    output = torch.zeros(B, T, W, V, dtype=torch.float64)
    final = torch.zeros(B, W, K, V, dtype=torch.float64)
    for row in range(B):
        for head in range(W):
            S = torch.zeros(K, V, dtype=torch.float64) if state is None else state[row, head].double()
            for t in range(T):
                query, key = q[row, t, head // (W // H)], k[row, t, head // (W // H)]
                query, key = (x / (x.square().sum() + 1e-6).sqrt() for x in (query, key))
                S = log_decay[row, t, head].exp()[:, None] * S
                S = S + beta[row, t, head] * torch.outer(key, v[row, t, head] - S.T @ key)
                output[row, t, head] = S.T @ query * K**-0.5
            final[row, head] = S
    return output, final


@pytest.mark.parametrize("state_v_first", [False, True])
@OPERATORS
def test_operators_equal_a_loop(operator, state_v_first):
    tensors, state = draw(), torch.randn(B, W, K, V, generator=torch.Generator().manual_seed(1))
    log_decay, beta = -F.softplus(tensors["g"]), tensors["beta"].sigmoid()
    expected, final = loop(tensors["q"], tensors["k"], tensors["v"], log_decay, beta, state)
    output, found = operator(
        **tensors | {"g": log_decay, "beta": beta}, use_qk_l2norm_in_kernel=True, output_final_state=True,
        initial_state=state.mT.contiguous() if state_v_first else state, state_v_first=state_v_first,
    )  # fmt: skip
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((found.mT if state_v_first else found).double(), final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@OPERATORS
def test_gate_and_beta_inside_the_operator(operator, lower_bound):
    tensors = draw()
    A_log, dt_bias = torch.randn(W), torch.randn(W * K)
    raw = tensors["g"] + dt_bias.view(W, K)
    rate = A_log.exp()[:, None]
    log_decay = -rate * F.softplus(raw) if lower_bound is None else lower_bound * torch.sigmoid(rate * raw)
    expected, _ = loop(tensors["q"], tensors["k"], tensors["v"], log_decay, 2 * tensors["beta"].sigmoid())
    output, state = operator(
        **tensors, A_log=A_log, dt_bias=dt_bias, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=True, lower_bound=lower_bound, use_qk_l2norm_in_kernel=True,
    )  # fmt: skip
    assert state is None
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_model_gives_step_by_step_what_it_gives_at_once():
    torch.manual_seed(0)
    config = KDAConfig(hidden_size=32, num_heads=2, num_v_heads=4, head_dim=8, num_hidden_layers=2, vocab_size=50)
    model, tokens = KDAForCausalLM(config).eval(), torch.randint(50, (2, 70))
    whole = model(tokens).logits
    result = model(tokens[:, :66], use_cache=True)
    logits = [result.logits]
    for t in range(66, 70):
        result = model(tokens[:, t : t + 1], past_key_values=result.past_key_values, use_cache=True)
        logits.append(result.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = KDAForCausalLM(KDAConfig(hidden_size=32, num_heads=2, head_dim=8, num_hidden_layers=1, vocab_size=50))
    tokens = torch.randint(50, (2, 12))
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_what_only_kernels_have_is_refused():
    with pytest.raises(ValueError, match="keeps no states"):
        chunk_kda(**draw(), return_intermediate_states=True)

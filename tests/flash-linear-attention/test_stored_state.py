"""The delta rule with a stored state against a float64 loop that stores where an engine does.

Shapes: B rows, T tokens, H key heads, W value heads, K key channels, V value channels.
"""

import pytest
import torch
from delta_rule_reference import draw_inputs, relative_error
from fla_torch import operators
from fla_torch.stored_state import stored_delta_rule

B, H, W, K, V = 2, 2, 4, 7, 5


def coarse(state: torch.Tensor) -> torch.Tensor:
    return (state * 8).round() / 8


def loop(query, key, value, beta, log_decay, state, every, store):
    """Head by head and token by token; the output sees the state before it is stored."""
    B, T, H = key.shape[:3]
    W = value.shape[2]
    output, final = torch.zeros_like(value), torch.zeros_like(state)
    for row in range(B):
        for head in range(W):
            S = state[row, head]
            for t in range(T):
                k, q = key[row, t, head * H // W], query[row, t, head * H // W]
                if log_decay is not None:
                    S = S * log_decay[row, t, head].exp()
                S = S + torch.outer(k, beta[row, t, head] * (value[row, t, head] - S.T @ k))
                output[row, t, head] = 0.5 * S.T @ q
                if (t + 1) % every == 0 or t + 1 == T:
                    S = store(S)
            final[row, head] = S
    return output, final


def decays(log_decay_BTW, kind):
    """The log decay as the loop takes it, ``[B, T, W, K or 1, V or 1]``."""
    if kind == "none":
        return None
    per_head = log_decay_BTW[..., None, None]
    return per_head * torch.rand(K, 1, dtype=per_head.dtype) if kind == "key" else per_head


@pytest.mark.parametrize("every", [1, 4, 70, 100])
@pytest.mark.parametrize("kind", ["none", "head", "key"])
@pytest.mark.parametrize("beta_per_channel", [False, True])
def test_follows_the_definition(every, kind, beta_per_channel):
    torch.manual_seed(0)
    query, key, value, beta, log_decay, state = draw_inputs(1, B=B, T=90, H=H, W=W, K=K, V=V, dtype=torch.float64)
    log_decay = decays(log_decay, kind)
    beta = torch.rand_like(value) if beta_per_channel else beta
    inputs = (query, key, value, beta, log_decay)
    expected = loop(*inputs, state, every, coarse)
    found = stored_delta_rule(*inputs, scale=0.5, initial_state_BWKV=state, store=coarse, every=every)
    exact = loop(*inputs, state, every, lambda S: S)
    unrounded = stored_delta_rule(*inputs, scale=0.5, initial_state_BWKV=state, every=every)
    for actual, wanted, other, without in zip(found, expected, unrounded, exact, strict=True):
        assert relative_error(actual, wanted) < 1e-12
        assert relative_error(other, without) < 1e-12
    # Within the first part no output sees any rounding.
    assert (relative_error(expected[0], exact[0]) > 1e-3) == (every < 90)
    assert relative_error(expected[1], exact[1]) > 1e-3


def test_the_initial_state_is_left_alone():
    inputs = draw_inputs(2, B=B, T=3, H=H, W=W, K=K, V=V)
    before = inputs[-1].clone()
    log_decay = decays(inputs[4], "head")
    stored_delta_rule(*inputs[:4], log_decay, scale=1.0, initial_state_BWKV=inputs[-1], store=lambda S: S.zero_())
    assert torch.equal(inputs[-1], before)


def test_operators_pass_on_what_the_rule_uses():
    """Gate, beta, norm and layout of the state are the operator's to undo."""
    query, key, value, beta, log_decay, state = draw_inputs(3, B=B, T=5, H=H, W=W, K=K, V=V)
    seen = []

    def recurrence(*operands, **settings):
        seen.append((operands, settings))
        return stored_delta_rule(*operands, **settings)

    arguments = dict(q=query, k=3 * key, v=value, beta=beta, initial_state=state.mT, state_v_first=True)
    arguments |= dict(g=log_decay, use_qk_l2norm_in_kernel=True, output_final_state=True)
    expected = operators.chunk_gated_delta_rule(**arguments)
    found = operators.chunk_gated_delta_rule(**arguments, recurrence=recurrence)
    ((_, key_BTHK, _, _, decay_BTWXX), settings) = seen[0]
    torch.testing.assert_close(key_BTHK.norm(dim=-1), torch.ones(B, 5, H))
    assert decay_BTWXX.shape == (B, 5, W, 1, 1) and settings["initial_state_BWKV"].shape == (B, W, K, V)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)

"""How far a stored state is from the exact one, in steps of its format: what rounds to nearest is within half a step.

Shapes: B batch, W value heads, K key channels, V value channels.
"""

import torch

# Bits of a significand, the first one included, and the exponent of the least normal number.
FLOATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126)}


def read(state, *, state_v_first=False):
    """Return a stored state as float64 ``[B, W, K, V]``; an int8 state is a pair, codes ``[B, W, V, K]`` and scales."""
    if torch.is_tensor(state):
        return (state.mT if state_v_first else state).double()
    codes, scales = state
    return (codes.double() * scales.double()[..., None]).mT


def steps_off(state, exact_BWKV, *, state_v_first=False):
    """Return the largest distance of a stored state from the exact one, in steps, less what float32 sums may be off.

    The step of a float is the distance of its neighbours at the exact number. That of an int8 row, the K numbers of a
    value channel, is its largest magnitude over 127, and the stored scale must be that.
    """
    exact = exact_BWKV.double()
    # Of a sum in float32, the error is a share of its largest terms.
    slack = 2e-6 * exact.abs().amax(-2, keepdim=True)
    if torch.is_tensor(state):
        bits, least = FLOATS[state.dtype]
        exponent = torch.frexp(exact).exponent.clamp(min=least + 1)
        step = torch.ldexp(torch.ones_like(exact), exponent - bits)
    else:
        step = exact.abs().amax(-2, keepdim=True) / 127
        assert state[0].dtype == torch.int8 and state[1].dtype == torch.float32
        torch.testing.assert_close(state[1].double(), step.squeeze(-2), rtol=1e-5, atol=1e-16)
    distance = (read(state, state_v_first=state_v_first) - exact).abs() - slack
    return (distance / step.clamp(min=1e-300)).max().item()

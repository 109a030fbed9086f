"""The delta rule as its definition reads, in float64: what the tests of this folder compare with.

Shapes: B batch, T tokens, H key heads, W value heads, K key channels, V value channels.
"""

import torch
import torch.nn.functional as F


def reference_delta_rule(query, key, value, beta, log_decay=None, *, scale, initial_state=None):
    """Run ``S <- a S; u = beta (v - S^T k); S <- S + k u^T; o = scale S^T q`` for each row, head and token in turn.

    Returns:
        Output ``[B, T, W, V]`` and the last state ``[B, W, K, V]``, float64.
    """
    query, key, value, beta = (tensor.double() for tensor in (query, key, value, beta))
    B, T, H, K = key.shape
    W, V = value.shape[2:]
    output = torch.zeros(B, T, W, V, dtype=torch.float64)
    final_state = torch.zeros(B, W, K, V, dtype=torch.float64)
    for b in range(B):
        for w in range(W):
            h = w * H // W
            state = torch.zeros(K, V, dtype=torch.float64) if initial_state is None else initial_state[b, w].double()
            for t in range(T):
                if log_decay is not None:
                    state = state * log_decay[b, t, w].double().exp()
                update = beta[b, t, w] * (value[b, t, w] - state.T @ key[b, t, h])
                state = state + torch.outer(key[b, t, h], update)
                output[b, t, w] = scale * (state.T @ query[b, t, h])
            final_state[b, w] = state
    return output, final_state


def draw_inputs(seed, *, B=1, T=64, H=1, W=1, K=4, V=4, gated=True, dtype=torch.float32, device="cpu"):
    """Return query, key (of unit length), value, beta, log decay (None ungated) and initial state, all random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = (
        normal(B, T, H, K),
        F.normalize(normal(B, T, H, K), dim=-1),
        normal(B, T, W, V),
        normal(B, T, W).sigmoid(),
        F.logsigmoid(normal(B, T, W) + 2) if gated else None,
        normal(B, W, K, V),
    )
    return tuple(None if tensor is None else tensor.to(device=device, dtype=dtype) for tensor in inputs)


def relative_error(actual, expected):
    """Return ``|actual - expected| / |expected|`` in the Euclidean norm, as a number."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm()).item()

"""What vLLM does between the convolution and the delta rule of a prefill, for heads of any two sizes.

Of each token the convolution leaves one row: all queries, all keys, all values. The delta rule wants three tensors, the
queries and keys normalised, and for each value head a decay and a writing strength (arXiv:2412.06464)::

    q <- q / sqrt(q . q + 1e-6)        g = -exp(A_log) softplus(a + dt_bias)
    k <- k / sqrt(k . k + 1e-6)        beta = sigmoid(b)

vLLM's own kernel does not compile where the next powers of two of K and V differ (docs/vllm-fault.md). This one is
launched once, reads every number once and writes it once, as that one does. It takes tokens by the sixteen, and of
them one head: queries and keys are heads of K channels that lie one after another, so one branch serves both.

Shapes: T tokens, H key heads, W value heads, K key channels, V value channels, C = 2 H K + W V.
"""

from typing import Any

import torch
import triton
import triton.language as tl

EPSILON = 1e-6
"""Under the root of the norm, as everywhere in vLLM."""
# Of one program, which has Triton's default of 4 warps: a head of 128 channels is then 2,048 numbers for 128 threads.
_TOKENS = 16


@triton.jit
def _log1p(x):
    """``log(1 + x)`` for 0 <= x <= 1, also where 1 + x rounds to 1 (Kahan's correction)."""
    rounded = 1.0 + x
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / tl.where(rounded == 1.0, 1.0, rounded - 1.0)))


@triton.jit(do_not_specialize=["T"])
def preparation_kernel(
    mixed_TC, a_TW, b_TW, A_log_W, dt_bias_W,
    query_key_2THK, value_TWV, decay_TW, beta_TW,
    T, mixed_stride, a_stride, b_stride,
    H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    K_TILE: tl.constexpr, V_TILE: tl.constexpr, TOKENS: tl.constexpr,
    NORMALIZE: tl.constexpr, EXPONENTIATE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Programs: (tokens by the sixteen, 2 H + W heads)."""
    # In 64 bits: a batch of 200,000 tokens has more numbers than 32 bits can count.
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < T
    head = tl.program_id(1)
    if head < 2 * H:
        key_channel = tl.arange(0, K_TILE)
        is_key = is_token[:, None] & (key_channel < K)[None, :]
        key_source = mixed_TC + token[:, None] * mixed_stride + (head * K + key_channel)[None, :]
        vector = tl.load(key_source, mask=is_key, other=0).to(tl.float32)
        if NORMALIZE:
            vector *= (1.0 / tl.sqrt(tl.sum(vector * vector, axis=1) + EPS))[:, None]
        # Query heads come first; the keys' tensor lies behind that of the queries.
        row = (token + (head // H) * T.to(tl.int64)) * H + head % H
        tl.store(query_key_2THK + row[:, None] * K + key_channel[None, :], vector, mask=is_key)
    else:
        # No name of the branch above: Triton refuses a variable of two shapes, and that is vLLM's fault.
        value_head = head - 2 * H
        value_channel = tl.arange(0, V_TILE)
        is_value = is_token[:, None] & (value_channel < V)[None, :]
        value_source = mixed_TC + token[:, None] * mixed_stride + (2 * H * K + value_head * V + value_channel)[None, :]
        copied = tl.load(value_source, mask=is_value, other=0)
        tl.store(value_TWV + (token * W + value_head)[:, None] * V + value_channel[None, :], copied, mask=is_value)
        gate = tl.load(a_TW + token * a_stride + value_head, mask=is_token, other=0).to(tl.float32)
        gate += tl.load(dt_bias_W + value_head).to(tl.float32)
        softplus = tl.maximum(gate, 0.0) + _log1p(tl.exp(-tl.abs(gate)))
        decay = -tl.exp(tl.load(A_log_W + value_head).to(tl.float32)) * softplus
        if EXPONENTIATE:
            decay = tl.exp(decay)
        strength = tl.load(b_TW + token * b_stride + value_head, mask=is_token, other=0).to(tl.float32)
        tl.store(decay_TW + token * W + value_head, decay, mask=is_token)
        tl.store(beta_TW + token * W + value_head, tl.sigmoid(strength), mask=is_token)


def prepare(
    mixed_TC: torch.Tensor,
    a_TW: torch.Tensor,
    b_TW: torch.Tensor,
    A_log_W: torch.Tensor,
    dt_bias_W: torch.Tensor,
    *,
    key_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    normalize: bool = True,
    exponentiate: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys, values, log decays and writing strengths of the tokens of a prefill.

    Args:
        mixed_TC: what the convolution left: queries ``[H, K]``, keys ``[H, K]``, values ``[W, V]`` of each token, in
            any floating dtype. It is copied first where the channels of a token do not lie one after another, and so
            are the two that follow.
        a_TW: the raw decay of each value head.
        b_TW: the raw writing strength.
        A_log_W, dt_bias_W: the gate's weights.
        key_heads: H.
        head_k_dim, head_v_dim: K and V.
        normalize: whether queries and keys are divided by their norm.
        exponentiate: whether the decay itself is returned in the place of its logarithm.

    Returns:
        ``[T, H, K]``, ``[T, H, K]`` and ``[T, W, V]`` in the dtype of ``mixed_TC``, ``[T, W]`` and ``[T, W]`` in
        float32, all contiguous.

    Raises ValueError if the channels are not as many as the heads say.
    """
    T, C = mixed_TC.shape
    H, W, K, V = key_heads, A_log_W.shape[0], head_k_dim, head_v_dim
    if C != 2 * H * K + W * V:
        raise ValueError(f"{C} channels a token, and {H} heads of {K} twice and {W} of {V} are {2 * H * K + W * V}")
    mixed_TC, a_TW, b_TW = (one if one.stride(1) == 1 else one.contiguous() for one in (mixed_TC, a_TW, b_TW))
    query_key_2THK = mixed_TC.new_empty(2, T, H, K)
    value_TWV = mixed_TC.new_empty(T, W, V)
    decay_TW, beta_TW = (mixed_TC.new_empty(T, W, dtype=torch.float32) for _ in range(2))
    if T:
        launch: Any = preparation_kernel[triton.cdiv(T, _TOKENS), 2 * H + W]  # whose types Triton does not tell
        launch(
            mixed_TC, a_TW, b_TW, A_log_W, dt_bias_W, query_key_2THK, value_TWV, decay_TW, beta_TW,
            T, mixed_TC.stride(0), a_TW.stride(0), b_TW.stride(0), H, W, K, V,
            triton.next_power_of_2(K), triton.next_power_of_2(V), _TOKENS, normalize, exponentiate, EPSILON,
        )  # fmt: skip
    query_THK, key_THK = query_key_2THK
    return query_THK, key_THK, value_TWV, decay_TW, beta_TW

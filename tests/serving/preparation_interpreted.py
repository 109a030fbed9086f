"""Run the preparation of a prefill in Triton's interpreter, chosen before Triton is imported: a program of its own.

It prints the errors against the definition in float64 as JSON. Run by ``test_vllm_plugin.py``.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F

from keyreduce.serving.vllm_preparation import prepare

# T, H, W, K, V: whole blocks of tokens and a rest, one token, sizes that are powers of two and others.
SIZES = ((16, 1, 2, 64, 128), (37, 2, 4, 6, 20), (1, 2, 3, 48, 16), (0, 1, 1, 4, 8))


def errors(size: tuple[int, ...], dtype: torch.dtype, normalize: bool, exponentiate: bool) -> dict[str, float]:
    """Return the largest error of each tensor, relative to the number that is right."""
    T, H, W, K, V = size
    draw = torch.Generator().manual_seed(sum(size))

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    # As vLLM has them: the convolution's channels lie beside others, and both gates are halves of one tensor. Gates
    # reach from where the exponential is nothing to where softplus is its argument.
    mixed_TC = drawn(T, 2 * H * K + W * V + 7).to(dtype)[:, :-7]
    b_TW, a_TW = (30 * drawn(T, 2 * W)).to(dtype).chunk(2, dim=-1)
    A_log_W, dt_bias_W = drawn(W), drawn(W).to(dtype)
    found = prepare(
        *(mixed_TC, a_TW, b_TW, A_log_W, dt_bias_W),
        **{"key_heads": H, "head_k_dim": K, "head_v_dim": V, "normalize": normalize, "exponentiate": exponentiate},
    )
    query, key, value_TC = mixed_TC.double().split([H * K, H * K, W * V], dim=-1)
    heads_THK = [vector.reshape(T, H, K) for vector in (query, key)]
    if normalize:
        heads_THK = [one / (one.square().sum(-1, keepdim=True) + 1e-6).sqrt() for one in heads_THK]
    decay_TW = -A_log_W.double().exp() * F.softplus(a_TW.double() + dt_bias_W.double(), threshold=1e9)
    decay_TW = decay_TW.exp() if exponentiate else decay_TW
    right = (*heads_THK, value_TC.reshape(T, W, V), decay_TW, b_TW.double().sigmoid())
    worst = {}
    for name, one, expected in zip(("query", "key", "value", "decay", "beta"), found, right, strict=True):
        assert one.is_contiguous() and one.shape == expected.shape
        assert one.dtype == (torch.float32 if name in ("decay", "beta") else dtype)
        # An exponential of a large number carries that number's rounding: it is measured against 1.
        scale = 1.0 if name == "decay" and exponentiate else expected.abs()
        worst[name] = float(((one - expected).abs() / scale).max()) if T else 0.0
    return worst


if __name__ == "__main__":
    cases = [(torch.float32, True, False), (torch.float32, False, True), (torch.bfloat16, True, False)]
    json.dump([{"dtype": str(case[0]), **errors(size, *case)} for size in SIZES for case in cases], sys.stdout)

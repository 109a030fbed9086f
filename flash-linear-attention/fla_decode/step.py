"""One decoding step: which tiles the kernel takes, and the launch.

Shapes: B sequences, H key heads, W value heads (a multiple of H), K key channels, V value channels.
"""

import contextlib
import functools
from typing import NamedTuple

import torch
import triton

from fla_decode.kernel import decode_kernel
from fla_decode.state import Int8State, empty_state

MAX_KEY_CHANNELS = 256


class Tiling(NamedTuple):
    """How the kernel takes the state: value channels of a tile, warps of a program, and cache policies.

    ``reads`` and ``writes`` of the state are an eviction policy or, with a dot, a modifier of PTX (of reads alone).
    With ``overlaps`` a launch begins while the one before it ends, on GPUs that can (programmatic dependent launch,
    Hopper and later). A tile comes in parts of ``width`` key channels, by default what `part_width` says; of a state
    ``[V, K]`` a thread takes ``run`` channels of a part in a row, by default 16 bytes.
    """

    block_v: int
    warps: int
    reads: str = "evict_first"
    writes: str = "evict_first"
    overlaps: bool = True
    width: int | None = None
    run: int | None = None


# By bytes of a number, layout and key channels, the best of searches as in decode_benchmark.py on an H100.
TILINGS = {
    (4, False): {32: Tiling(128, 2), 64: Tiling(64, 2), 96: Tiling(32, 2), 128: Tiling(64, 4), 256: Tiling(32, 8)},
    (4, True): {
        32: Tiling(128, 2),
        64: Tiling(32, 1, ".cg", ""),
        96: Tiling(16, 4, ".cg", ""),
        128: Tiling(16, 8, "", ""),
        256: Tiling(16, 8),
    },
    (2, False): {
        32: Tiling(64, 1, "", ""),
        64: Tiling(32, 2, ""),
        80: Tiling(32, 2, "", ""),
        96: Tiling(64, 4),
        128: Tiling(64, 4),
        256: Tiling(32, 8),
    },
    (2, True): {
        32: Tiling(64, 1, width=16),
        64: Tiling(64, 2, width=32, run=4),
        80: Tiling(64, 2, run=4),
        96: Tiling(32, 2),
        128: Tiling(64, 4),
        256: Tiling(16, 8),
    },
    # Of 80 channels a thread takes 4 bytes, and so each sector of memory is asked for twice: the cache must keep it.
    (1, True): {
        32: Tiling(64, 1),
        64: Tiling(32, 1),
        80: Tiling(16, 1, "", run=4),
        96: Tiling(64, 4, run=8),
        128: Tiling(16, 1),
        256: Tiling(16, 4),
    },
}
# So few columns of a state, over all heads, want small tiles, to reach every multiprocessor.
FEW_COLUMNS = 1 << 16
FEW = {False: Tiling(16, 1), True: Tiling(8, 1)}
MAX_NUMBERS = 80  # of a thread: more would not stay in registers
LEAST_WIDTH = 16  # narrower parts would waste fewer channels of odd sizes, but are too many


def choose_tiling(
    K: int, V: int, *, heads: int, state_v_first: bool, state_dtype: torch.dtype = torch.float32
) -> Tiling:
    """Return the tiling for a state of ``heads`` (sequences times value heads) times K times V."""
    tiling = FEW[state_v_first]
    if heads * V >= FEW_COLUMNS:
        by_channels = TILINGS[state_dtype.itemsize, state_v_first]
        tiling = next(found for most, found in by_channels.items() if most >= K)
    # A width that was found for one size need not suit the others for which it stands.
    width = tiling.width if tiling.width and K % tiling.width == 0 else part_width(K)
    run = min(tiling.run or 16 // state_dtype.itemsize, width)
    block_v = min(tiling.block_v, triton.next_power_of_2(V))
    needed = triton.next_power_of_2(triton.cdiv(width * triton.cdiv(K, width) * block_v, 32 * MAX_NUMBERS))
    return tiling._replace(block_v=block_v, warps=max(needed, tiling.warps), width=width, run=run)


def part_width(K: int) -> int:
    """Return the key channels of a part: the largest power of two that divides K, but 16 at least, if K has as many."""
    return max(K & -K, min(LEAST_WIDTH, triton.next_power_of_2(K)))


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Return whether a launch on a device can begin before the one before it has ended."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def decode_step(
    query_B1HK: torch.Tensor,
    key_B1HK: torch.Tensor,
    value_B1WV: torch.Tensor,
    beta_B1W: torch.Tensor,
    state: torch.Tensor | Int8State,
    *,
    scale: float | None = None,
    gate_B1W: torch.Tensor | None = None,
    A_log_W: torch.Tensor | None = None,
    dt_bias_W: torch.Tensor | None = None,
    normalize: bool = False,
    beta_is_logit: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    state_dtype: torch.dtype = torch.float32,
    inplace: bool = False,
    tiling: Tiling | None = None,
) -> tuple[torch.Tensor, torch.Tensor | Int8State]:
    """Step the delta rule by one token, without gradients (arXiv:2406.06484; gated: arXiv:2412.06464).

    Args:
        query_B1HK: queries; K at most `MAX_KEY_CHANNELS`.
        key_B1HK: keys.
        value_B1WV: values; each key head serves W / H value heads that lie side by side.
        beta_B1W: writing strengths.
        state: the state before, ``[B, W, K, V]``, or ``[B, W, V, K]`` with ``state_v_first``, or an `Int8State`.
        scale: factor of the output, by default ``K ** -0.5``.
        gate_B1W: log decay; None for the ungated rule. With ``A_log_W`` what precedes the gate.
        A_log_W: with it the log decay is ``-exp(A_log) softplus(gate + dt_bias)``.
        dt_bias_W: see there; None for 0.
        normalize: divide queries and keys by ``sqrt(sum of squares + 1e-6)`` first.
        beta_is_logit: the writing strength is the sigmoid of beta.
        allow_neg_eigval: double that.
        state_v_first: the layout of both states; an `Int8State` has but one.
        state_dtype: what the new state is stored as: float32, bfloat16, float16, or int8 for an `Int8State`.
        inplace: write the new state over the old one, if that is contiguous and stored alike.
        tiling: how to take the state, by default what `choose_tiling` says.

    Returns:
        Output ``[B, 1, W, V]`` in the dtype of the values, from float32 before the new state is rounded; and that
        state, in ``state_dtype``, laid out as the old one, or as an `Int8State` is.
    """
    tensors = (query_B1HK, key_B1HK, value_B1WV, beta_B1W, gate_B1W, A_log_W, dt_bias_W)
    query, key, value, beta, gate, A_log, dt_bias = (t if t is None else t.contiguous() for t in tensors)
    v_first = state_v_first or state_dtype == torch.int8 or not torch.is_tensor(state)
    if v_first != state_v_first and torch.is_tensor(state):
        state = state.mT
    old, scales = parts = _parts(state)
    is_kept = inplace and old.dtype == state_dtype and all(part is None or part.is_contiguous() for part in parts)
    new_state = state if is_kept else empty_state(old.shape, state_dtype, old.device)
    new, new_scales = _parts(new_state)
    output = torch.empty_like(value)
    W, V, K = value.shape[2], value.shape[3], key.shape[3]
    tiling = tiling or choose_tiling(K, V, heads=old.shape[0] * W, state_v_first=v_first, state_dtype=state_dtype)
    width = tiling.width or part_width(K)
    programs = old.shape[0] * W * triton.cdiv(V, tiling.block_v)
    overlap = {"launch_pdl": True} if tiling.overlaps and can_overlap(old.device) else {}
    with torch.cuda.device(old.device) if old.is_cuda else contextlib.nullcontext():
        decode_kernel[(programs,)](
            query, key, value, beta, gate, A_log, dt_bias,
            old.contiguous(), scales if scales is None else scales.contiguous(), new, new_scales, output,
            K**-0.5 if scale is None else scale,
            H=key.shape[2], W=W, K=K, V=V,
            WIDTH=width, RUN=min(tiling.run or 16 // state_dtype.itemsize, width), BLOCK_V=tiling.block_v,
            HAS_GATE=gate is not None, IS_GATE_RAW=A_log is not None, HAS_DT_BIAS=dt_bias is not None,
            NORMALIZE=normalize, BETA_IS_LOGIT=beta_is_logit, DOUBLE_BETA=allow_neg_eigval, V_FIRST=v_first,
            HAS_SCALES=scales is not None, WRITES_SCALES=new_scales is not None,
            READ_CACHE=tiling.reads if tiling.reads[:1] == "." else "",
            READ_POLICY=tiling.reads if tiling.reads[:1] != "." else "",
            WRITE_POLICY=tiling.writes, OVERLAPS=bool(overlap), num_warps=tiling.warps, **overlap,
        )  # fmt: skip
    if v_first != state_v_first and torch.is_tensor(new_state):
        new_state = new_state.mT.contiguous()
    return output, new_state


def _parts(state: torch.Tensor | Int8State) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the numbers of a state, and their scales where it has some."""
    return (state, None) if torch.is_tensor(state) else tuple(state)

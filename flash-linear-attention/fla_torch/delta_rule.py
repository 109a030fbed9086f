"""The delta rule and its gated form in PyTorch: one token at a time, and in chunks.

Per value head, with state ``S`` of shape ``[K, V]``, decay ``a_t = exp(log_decay_t)`` (1 where ungated)::

    u_t = beta_t (v_t - a_t S_{t-1}^T k_t)
    S_t = a_t S_{t-1} + k_t u_t^T
    o_t = scale S_t^T q_t

Sources: the delta rule, Yang et al., arXiv:2406.06484; the gated one, arXiv:2412.06464. How a chunk
is computed stands in ``segment.py``.

Shapes: B batch, T tokens, H key heads, W value heads (a multiple of H), N = B W, K key channels, V value channels.
"""

import torch
import torch.nn.functional as F

from fla_torch.segment import Segment, run_segment

CHUNK_SIZE = 64
_STATES_BYTES = 2**30  # of the states that a segment keeps on CUDA
# On a CPU shorter chunks take fewer operations, but a backward pass keeps a state for each.
CPU_CHUNK_SIZE = 32
_CPU_TOKENS = {False: 4096, True: 2048}  # tokens times heads of a segment on a CPU, by whether its states are kept


def chunked_delta_rule(
    query_BTHK: torch.Tensor,
    key_BTHK: torch.Tensor,
    value_BTWV: torch.Tensor,
    beta_BTW: torch.Tensor,
    log_decay_BTW: torch.Tensor | None = None,
    *,
    scale: float,
    initial_state_BWKV: torch.Tensor | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the delta rule in chunks: matrix products, and one triangular inverse a chunk, in float32 or float64.

    Inputs of 16 bits are widened. On CUDA the operands of their products are then rounded to TF32, which has as many
    bits as float16 and more than bfloat16; sums and states are float32.

    Args:
        query_BTHK: queries, as the operator uses them (normalised already, where they are).
        key_BTHK: keys, likewise.
        value_BTWV: values; each key head serves W / H value heads that lie side by side.
        beta_BTW: writing strengths.
        log_decay_BTW: natural logarithm of the decay, at most 0; None for the ungated rule.
        scale: factor of the output.
        initial_state_BWKV: state before the first token; None for zeros.
        chunk_size: tokens solved at once, rounded down to a power of two; at most 32 on a CPU where no gradient is
            asked for. T need not be a multiple.

    Returns:
        Output ``[B, T, W, V]`` in the dtype of the values, and the state after the last token ``[B, W, K, V]`` in
        float32, or float64 where the values are. Gradients flow to every input, once: not through a gradient again.
    """
    (B, T, _, K), (W, V) = key_BTHK.shape, value_BTWV.shape[-2:]
    dtype = value_BTWV.dtype if value_BTWV.dtype == torch.float64 else torch.float32
    reduced = value_BTWV.is_cuda and value_BTWV.dtype.itemsize == 2
    if initial_state_BWKV is None:
        state_NKV = value_BTWV.new_zeros(B * W, K, V, dtype=dtype)
    else:
        state_NKV = initial_state_BWKV.to(dtype).flatten(0, 1)
    inputs = (query_BTHK, key_BTHK, value_BTWV, beta_BTW, log_decay_BTW)
    is_recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*inputs, state_NKV))
    if not (value_BTWV.is_cuda or is_recorded):
        chunk_size = min(chunk_size, CPU_CHUNK_SIZE)
    # A power of two, at which products are fast, and no longer than the sequence needs.
    chunk_size = 1 << (min(chunk_size, 2 * T - 1).bit_length() - 1)
    settings = (scale, chunk_size, reduced)
    output_BTWV = torch.empty(value_BTWV.shape, dtype=value_BTWV.dtype, device=value_BTWV.device)
    outputs = []
    length = chunk_size * _chunks_at_once(state_NKV, chunk_size, is_recorded)
    for start in range(0, T, length):
        part = slice(start, min(start + length, T))
        missing = -(part.stop - start) % chunk_size
        # Behind the end keys, beta and log decay are 0: the state stays as it is.
        segment = [None if x is None else _pad(x[:, part], missing) for x in inputs]
        if is_recorded:
            segment_BTWV, state_NKV = Segment.apply(*segment, state_NKV, *settings)
            outputs.append(segment_BTWV)
            continue
        place_BTWV = output_BTWV[:, part] if not missing else torch.empty_like(segment[2])
        state_NKV, _ = run_segment(*segment, state_NKV, *settings, place_BTWV)
        if missing:
            output_BTWV[:, part] = place_BTWV[:, : part.stop - start]
    output_BTWV = torch.cat(outputs, dim=1)[:, :T] if is_recorded else output_BTWV
    return output_BTWV, state_NKV.unflatten(0, (B, W))


def _chunks_at_once(state_NKV: torch.Tensor, chunk_size: int, is_recorded: bool) -> int:
    """Return how many chunks a segment has: as many as are fast, within a bound on memory."""
    if state_NKV.is_cuda:
        return max(1, _STATES_BYTES // (state_NKV.numel() * state_NKV.itemsize))
    return max(1, _CPU_TOKENS[is_recorded] // (chunk_size * len(state_NKV)))


def _pad(tensor_BTX: torch.Tensor, missing: int) -> torch.Tensor:
    return F.pad(tensor_BTX, (0, 0) * (tensor_BTX.ndim - 2) + (0, missing)) if missing else tensor_BTX


def recurrent_delta_rule(
    query_BTHK: torch.Tensor,
    key_BTHK: torch.Tensor,
    value_BTWV: torch.Tensor,
    beta_BTW: torch.Tensor,
    log_decay_BTWKV: torch.Tensor | None = None,
    *,
    scale: float,
    initial_state_BWKV: torch.Tensor | None = None,
    written_BTHK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the delta rule token by token: what decoding does, and the definition in its plainest form.

    Arguments and results are those of :func:`chunked_delta_rule`, except that the log decay is
    ``[B, T, W, K or 1, V or 1]``, so that a decay per key or per value channel is possible, that
    ``beta`` may also be per value channel, ``[B, T, W, V]``, and that other keys may be written than are read.
    """
    B, T, H, K = key_BTHK.shape
    W, V = value_BTWV.shape[-2:]
    keys = (key_BTHK, key_BTHK if written_BTHK is None else written_BTHK)
    query_BTWK, key_BTWK, written_BTWK = (x.repeat_interleave(W // H, dim=2) for x in (query_BTHK * scale, *keys))
    beta_BTWX = beta_BTW if beta_BTW.ndim == value_BTWV.ndim else beta_BTW[..., None]
    state_BWKV = value_BTWV.new_zeros(B, W, K, V) if initial_state_BWKV is None else initial_state_BWKV
    outputs = []
    for t in range(T):
        if log_decay_BTWKV is not None:
            state_BWKV = state_BWKV * log_decay_BTWKV[:, t].exp()
        key_BWK1 = key_BTWK[:, t, ..., None]
        remembered_BWV = (key_BWK1 * state_BWKV).sum(dim=-2)
        update_BWV = (value_BTWV[:, t] - remembered_BWV) * beta_BTWX[:, t]
        state_BWKV = state_BWKV + written_BTWK[:, t, ..., None] * update_BWV[..., None, :]
        outputs.append((query_BTWK[:, t, ..., None] * state_BWKV).sum(dim=-2))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(value_BTWV), state_BWKV

"""The delta rule and its gated form in PyTorch: one token at a time, and in chunks.

Per value head, with state ``S`` of shape ``[K, V]``, decay ``a_t = exp(log_decay_t)`` (1 where ungated)::

    u_t = beta_t (v_t - a_t S_{t-1}^T k_t)
    S_t = a_t S_{t-1} + k_t u_t^T
    o_t = scale S_t^T q_t

Sources: the delta rule, Yang et al., arXiv:2406.06484; the gated one, arXiv:2412.06464. Chunking: within a
chunk the ``u`` solve a unit lower triangular system, ``(I + L) u = beta (v - decayed S_0^T k)`` with
``L_ij = beta_i exp(c_i - c_j) k_i . k_j`` for j < i and ``c`` the running sum of the log decay in the chunk.

Shapes: B batch, T tokens, C tokens of a chunk, H key heads, W value heads (a multiple of H), M = B H, N = B W,
K key channels, V value channels.
"""

import torch

CHUNK_SIZE = 64


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
    """Run the delta rule in chunks: matrix products, and one triangular solve a chunk.

    Args:
        query_BTHK: queries, as the operator uses them (normalised already, where they are).
        key_BTHK: keys, likewise.
        value_BTWV: values; each key head serves W / H value heads that lie side by side.
        beta_BTW: writing strengths.
        log_decay_BTW: natural logarithm of the decay, at most 0; None for the ungated rule.
        scale: factor of the output.
        initial_state_BWKV: state before the first token; None for zeros.
        chunk_size: tokens solved at once. T need not be a multiple.

    Returns:
        Output ``[B, T, W, V]`` and the state after the last token ``[B, W, K, V]``, in the inputs' dtype
        (one floating dtype for all). Gradients flow to every input.
    """
    (B, _, H, K), (W, V) = key_BTHK.shape, value_BTWV.shape[-2:]

    def chunks_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensor.split(chunk_size, dim=1)

    def for_each_value_head(tensor_MXX: torch.Tensor) -> torch.Tensor:
        return tensor_MXX if W == H else tensor_MXX.repeat_interleave(W // H, dim=0)

    state_NKV = value_BTWV.new_zeros(B * W, K, V) if initial_state_BWKV is None else initial_state_BWKV.flatten(0, 1)
    # Above the diagonal the exponent of a decay would be positive and could overflow: there exp is to give 0.
    future_CC = value_BTWV.new_full((chunk_size, chunk_size), -torch.inf).triu(1)
    log_decays = [None] * len(chunks_of(beta_BTW)) if log_decay_BTW is None else chunks_of(log_decay_BTW)
    inputs = (query_BTHK, key_BTHK, value_BTWV, beta_BTW)
    optional_inputs = (log_decay_BTW, initial_state_BWKV)
    is_recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs + optional_inputs)
    # Where autograd does not keep them, chunks are written into place: the memory of one serves the next.
    output_BTWV = torch.empty(value_BTWV.shape, dtype=value_BTWV.dtype, device=value_BTWV.device)
    outputs = []
    for query_BCHK, key_BCHK, value_BCWV, beta_BCW, log_decay_BCW, place_BCWV in zip(
        *map(chunks_of, inputs), log_decays, chunks_of(output_BTWV), strict=True
    ):
        C = key_BCHK.shape[1]
        query_MCK, key_MCK = _by_head(query_BCHK).contiguous(), _by_head(key_BCHK).contiguous()
        value_NCV, beta_NC1 = _by_head(value_BCWV), _by_head(beta_BCW[..., None])
        key_gram_NCC = for_each_value_head(key_MCK @ key_MCK.mT)
        query_gram_NCC = for_each_value_head(query_MCK @ key_MCK.mT)
        query_NCK = for_each_value_head(query_MCK)
        reading_NCK = writing_NCK = for_each_value_head(key_MCK)
        kept_NKV = state_NKV
        if log_decay_BCW is None:
            query_gram_NCC = query_gram_NCC.tril()
        else:
            sum_NC1 = _by_head(log_decay_BCW[..., None]).cumsum(dim=1)
            since_start_NC1, to_end_NC1 = sum_NC1.exp(), (sum_NC1[:, -1:] - sum_NC1).exp()
            between_NCC = (sum_NC1 - sum_NC1.mT + future_CC[:C, :C]).exp()
            key_gram_NCC, query_gram_NCC = key_gram_NCC * between_NCC, query_gram_NCC * between_NCC
            query_NCK = query_NCK * since_start_NC1
            reading_NCK, writing_NCK = reading_NCK * since_start_NC1, writing_NCK * to_end_NC1
            kept_NKV = state_NKV * since_start_NC1[:, -1:]
        error_NCV = torch.baddbmm(value_NCV, reading_NCK, state_NKV, alpha=-1)
        # Solved from the right, on transposes: row-major tensors then go to BLAS without a copy.
        update_NCV = torch.linalg.solve_triangular(
            (key_gram_NCC * beta_NC1).mT, (error_NCV * beta_NC1).mT, upper=True, left=False, unitriangular=True
        ).mT
        output_NCV = torch.baddbmm(query_NCK @ state_NKV, query_gram_NCC, update_NCV, beta=scale, alpha=scale)
        output_BCWV = output_NCV.unflatten(0, (B, W)).transpose(1, 2)
        if is_recorded:
            outputs.append(output_BCWV)
        else:
            place_BCWV.copy_(output_BCWV)
        state_NKV = torch.baddbmm(kept_NKV, writing_NCK.mT, update_NCV)
    output_BTWV = torch.cat(outputs, dim=1) if is_recorded else output_BTWV
    return output_BTWV, state_NKV.unflatten(0, (B, W))


def _by_head(tensor_BCHX: torch.Tensor) -> torch.Tensor:
    return tensor_BCHX.transpose(1, 2).flatten(0, 1)


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

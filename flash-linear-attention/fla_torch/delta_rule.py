"""The delta rule and its gated form in PyTorch: one token at a time, and in chunks.

Per value head, with state ``S`` of shape ``[K, V]``, decay ``a_t = exp(log_decay_t)`` (1 where ungated)::

    u_t = beta_t (v_t - a_t S_{t-1}^T k_t)
    S_t = a_t S_{t-1} + k_t u_t^T
    o_t = scale S_t^T q_t

Sources: the delta rule, Yang et al., arXiv:2406.06484; the gated one, arXiv:2412.06464. Chunking: within a
chunk the ``u`` solve a unit lower triangular system, ``(I + L) u = beta (v - decayed S_0^T k)`` with
``L_ij = beta_i exp(c_i - c_j) k_i . k_j`` for j < i and ``c`` the running sum of the log decay in the chunk.

Shapes: B batch, T tokens, C tokens of a chunk, H key heads, G value heads per key head, W = H G value heads,
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
        value_BTWV: values; W is a multiple of H, and key head h serves value heads h G to h G + G - 1.
        beta_BTW: writing strengths.
        log_decay_BTW: natural logarithm of the decay, at most 0; None for the ungated rule.
        scale: factor of the output.
        initial_state_BWKV: state before the first token; None for zeros.
        chunk_size: tokens solved at once. T need not be a multiple.

    Returns:
        Output ``[B, T, W, V]`` and the state after the last token ``[B, W, K, V]``, in the inputs' dtype
        (one floating dtype for all). Gradients flow to every input.
    """
    B, T, H, K = key_BTHK.shape
    W, V = value_BTWV.shape[-2:]
    G = W // H

    def chunks_of(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensor.split(chunk_size, dim=1)

    # Within a key head its G value heads lie side by side, so that products with the state run once per key head.
    if initial_state_BWKV is None:
        state_BHKGV = value_BTWV.new_zeros(B, H, K, G, V)
    else:
        state_BHKGV = initial_state_BWKV.view(B, H, G, K, V).transpose(2, 3)
    log_decays = [None] * len(chunks_of(beta_BTW)) if log_decay_BTW is None else chunks_of(log_decay_BTW)
    outputs = []
    for query_BCHK, key_BCHK, value_BCWV, beta_BCW, log_decay_BCW in zip(
        chunks_of(query_BTHK), chunks_of(key_BTHK), chunks_of(value_BTWV), chunks_of(beta_BTW), log_decays, strict=True
    ):
        C = key_BCHK.shape[1]
        key_BHCK = key_BCHK.transpose(1, 2).contiguous()
        query_BHCK = query_BCHK.transpose(1, 2) * scale
        value_BHGCV = value_BCWV.view(B, C, H, G, V).permute(0, 2, 3, 1, 4)
        beta_BHGC1 = beta_BCW.view(B, C, H, G, 1).permute(0, 2, 3, 1, 4)
        # Keys and queries meet the keys and the state in one product each.
        both_BHEK = torch.cat([key_BHCK, query_BHCK], dim=2)
        gram_BH1EC = (both_BHEK @ key_BHCK.mT)[:, :, None]
        read_BHEGV = (both_BHEK @ state_BHKGV.reshape(B, H, K, G * V)).view(B, H, 2 * C, G, V)
        read_BHGEV = read_BHEGV.transpose(2, 3)
        remembered_BHGCV, answered_BHGCV = read_BHGEV.split(C, dim=3)
        key_gram, query_gram = gram_BH1EC.split(C, dim=3)
        if log_decay_BCW is not None:
            sum_BHGC1 = log_decay_BCW.view(B, C, H, G, 1).permute(0, 2, 3, 1, 4).cumsum(dim=3)
            # Above the diagonal the exponent would be positive and could overflow: mask before exp.
            above = torch.ones(C, C, dtype=torch.bool, device=key_BHCK.device).triu(1)
            between_BHGCC = (sum_BHGC1 - sum_BHGC1.mT).masked_fill(above, -torch.inf).exp()
            since_start_BHGC1 = sum_BHGC1.exp()
            remembered_BHGCV = remembered_BHGCV * since_start_BHGC1
            answered_BHGCV = answered_BHGCV * since_start_BHGC1
            key_gram, query_gram = key_gram * between_BHGCC, query_gram * between_BHGCC
        else:
            query_gram = query_gram.tril()
        # Solved from the right, on transposes: row-major tensors then go to LAPACK without a copy.
        update_BHGCV = torch.linalg.solve_triangular(
            (key_gram * beta_BHGC1).mT,
            ((value_BHGCV - remembered_BHGCV) * beta_BHGC1).mT,
            upper=True,
            left=False,
            unitriangular=True,
        ).mT
        output_BHGCV = answered_BHGCV + query_gram @ update_BHGCV
        outputs.append(output_BHGCV.permute(0, 3, 1, 2, 4).reshape(B, C, W, V))
        if log_decay_BCW is not None:
            to_end_BHGC1 = (sum_BHGC1[..., -1:, :] - sum_BHGC1).exp()
            update_BHGCV = update_BHGCV * to_end_BHGC1
            state_BHKGV = state_BHKGV * since_start_BHGC1[..., -1, 0][:, :, None, :, None]
        written_BHCGV = update_BHGCV.transpose(2, 3).reshape(B, H, C, G * V)
        state_BHKGV = state_BHKGV + (key_BHCK.mT @ written_BHCGV).view(B, H, K, G, V)
    return torch.cat(outputs, dim=1), state_BHKGV.transpose(2, 3).reshape(B, W, K, V)


def recurrent_delta_rule(
    query_BTHK: torch.Tensor,
    key_BTHK: torch.Tensor,
    value_BTWV: torch.Tensor,
    beta_BTW: torch.Tensor,
    log_decay_BTWKV: torch.Tensor | None = None,
    *,
    scale: float,
    initial_state_BWKV: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the delta rule token by token: what decoding does, and the definition in its plainest form.

    Arguments and results are those of :func:`chunked_delta_rule`, except that the log decay is
    ``[B, T, W, K or 1, V or 1]``, so that a decay per key or per value channel is possible, and that
    ``beta`` may also be per value channel, ``[B, T, W, V]``.
    """
    B, T, H, K = key_BTHK.shape
    W, V = value_BTWV.shape[-2:]
    query_BTWK, key_BTWK = (tensor.repeat_interleave(W // H, dim=2) for tensor in (query_BTHK * scale, key_BTHK))
    beta_BTWX = beta_BTW if beta_BTW.ndim == value_BTWV.ndim else beta_BTW[..., None]
    state_BWKV = value_BTWV.new_zeros(B, W, K, V) if initial_state_BWKV is None else initial_state_BWKV
    outputs = []
    for t in range(T):
        if log_decay_BTWKV is not None:
            state_BWKV = state_BWKV * log_decay_BTWKV[:, t].exp()
        key_BWK1 = key_BTWK[:, t, ..., None]
        remembered_BWV = (key_BWK1 * state_BWKV).sum(dim=-2)
        update_BWV = (value_BTWV[:, t] - remembered_BWV) * beta_BTWX[:, t]
        state_BWKV = state_BWKV + key_BWK1 * update_BWV[..., None, :]
        outputs.append((query_BTWK[:, t, ..., None] * state_BWKV).sum(dim=-2))
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(value_BTWV), state_BWKV

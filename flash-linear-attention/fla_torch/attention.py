"""Softmax attention of fla's hybrid models, in place of two functions of the package flash-attn.

    O_t = sum_s softmax_s(Q_t . K_s / sqrt(C)) V_s,    s among the keys that query t sees

(Vaswani et al. 2017, arXiv:1706.03762, equation 1; key heads shared by groups of query heads: Ainslie et al. 2023,
arXiv:2305.13245; the sliding window: Beltagy et al. 2020, arXiv:2004.05150, section 3.1). PyTorch's
``scaled_dot_product_attention`` computes it. Of flash-attn's arguments these are the ones that fla's layers pass.

Shapes: B batch, T queries, S keys, H query heads, G key heads (H is a multiple of G), C channels; P packed queries,
R packed keys, N sequences.
"""

import torch
import torch.nn.functional as F


def flash_attn_func(q, k, v, *, causal=False, window_size=(-1, -1)):
    """Return what each query gathers from the keys that it sees, ``[B, T, H, C]``, in the dtype of ``q``.

    The last query stands at the place of the last key: with a cache there are fewer queries than keys.

    Args:
        q: ``[B, T, H, C]``.
        k, v: ``[B, S, G, C]``; query heads ``g H/G`` to ``(g + 1) H/G - 1`` share key head g.
        causal: no key behind the query's own place is seen.
        window_size: how many keys before and behind its own place a query sees at most; -1 for all.
    """
    T, S = q.shape[1], k.shape[1]
    before, behind = window_size
    if causal:
        behind = 0
    # Told so, rather than by a mask, PyTorch skips the half that is not seen. It aligns the first query and key.
    is_plainly_causal = before < 0 and behind == 0 and T == S
    seen_TS = None if is_plainly_causal else _seen(T, S, before, behind, q.device)
    output_BHTC = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen_TS, is_causal=is_plainly_causal, enable_gqa=True
    )
    return output_BHTC.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, window_size=(-1, -1)
):
    """Return :func:`flash_attn_func` of each of N sequences that lie one behind the other, ``[P, H, C]``.

    Args:
        q: ``[P, H, C]``.
        k, v: ``[R, G, C]``.
        cu_seqlens_q, cu_seqlens_k: ``[N + 1]``, where each sequence begins among queries and keys, and their number.
        max_seqlen_q, max_seqlen_k: the longest lengths, of which nothing depends here.
        causal, window_size: as in :func:`flash_attn_func`.
    """
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    sequences = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat(
        [
            flash_attn_func(*(x[None] for x in sequence), causal=causal, window_size=window_size)[0]
            for sequence in sequences
        ]
    )


def _seen(T: int, S: int, before: int, behind: int, device: torch.device) -> torch.Tensor:
    """Return ``[T, S]``: whether a query sees a key."""
    place_T1 = torch.arange(S - T, S, device=device)[:, None]
    distance_TS = place_T1 - torch.arange(S, device=device)
    seen_TS = torch.ones_like(distance_TS, dtype=torch.bool)
    if before >= 0:
        seen_TS &= distance_TS <= before
    if behind >= 0:
        seen_TS &= distance_TS >= -behind
    return seen_TS

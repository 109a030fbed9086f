"""Rotary position embedding. Shapes: B batch, T tokens, H heads, D channels, P positions, R rotated pairs."""

import torch

from fla_torch.numerics import widen


def rotary_embedding_fwdbwd(
    x, cos, sin, seqlen_offsets=0, cu_seqlens=None, interleaved=False, inplace=False, conjugate=False,
    chunk_indices=None,
):  # fmt: skip
    """Rotate the first 2 R channels of ``x`` ``[B, T, H, D]`` by the angle of their position; return it.

    Args:
        cos, sin: caches ``[P, R]``.
        seqlen_offsets: the first token's position: a number, or one for each sequence.
        cu_seqlens: bounds of the sequences packed in one row; positions begin anew in each.
        interleaved: pair channels (0, 1), (2, 3), ... rather than (0, R), (1, R + 1), ...
        conjugate: rotate back, which is the backward pass.

    Tokens whose position falls outside the caches (left padding has negative ones) become 0 in the rotated
    channels, as in fla.
    """
    T, R = x.shape[1], cos.shape[1]
    index_T = torch.arange(T, device=x.device)
    offsets = torch.as_tensor(seqlen_offsets, device=x.device).reshape(-1, 1)
    if cu_seqlens is None:
        position_BT = index_T + offsets
    else:
        sequence_T = torch.searchsorted(cu_seqlens[1:].contiguous(), index_T, right=True)
        offset_T = offsets[:, 0].expand(len(cu_seqlens) - 1)[sequence_T]
        position_BT = (index_T - cu_seqlens[sequence_T] + offset_T)[None]
    is_inside = ((position_BT >= 0) & (position_BT < len(cos)))[:, :, None, None]
    position_BT = position_BT.clamp(0, len(cos) - 1)
    cos_BT1R, sin_BT1R = widen(cos)[position_BT][:, :, None], widen(sin)[position_BT][:, :, None]
    if conjugate:
        sin_BT1R = -sin_BT1R
    rotated = widen(x[..., : 2 * R])
    first, second = rotated.unflatten(-1, (R, 2)).unbind(-1) if interleaved else rotated.chunk(2, dim=-1)
    turned = (first * cos_BT1R - second * sin_BT1R, first * sin_BT1R + second * cos_BT1R)
    turned = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    output = x if inplace else x.clone()
    output[..., : 2 * R] = torch.where(is_inside, turned, 0).to(x.dtype)
    return output

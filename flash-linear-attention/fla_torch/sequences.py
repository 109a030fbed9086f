"""Packed sequences, as ``cu_seqlens`` describes them, to padded rows and back.

Shapes: P packed tokens, N sequences, T tokens of the longest sequence.
"""

import torch
from torch.nn.utils.rnn import pad_sequence


def unpack(packed_1P: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Give each packed sequence a row of its own, zeros behind its end.

    Args:
        packed_1P: ``[1, P, ...]``, N sequences one behind the other.
        cu_seqlens: ``[N + 1]``, where each begins, and P.

    Returns:
        ``[N, T, ...]`` with T the longest length.

    Raises:
        ValueError: there is more than one row.
    """
    if packed_1P.shape[0] != 1:
        raise ValueError(f"sequences packed by cu_seqlens lie in one row: batch size 1, not {packed_1P.shape[0]}")
    return pad_sequence(packed_1P[0].split(cu_seqlens.diff().tolist()), batch_first=True)


def pack(rows_NT: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Undo :func:`unpack`: ``[N, T, ...]`` to ``[1, P, ...]``."""
    lengths_N = cu_seqlens.diff()
    is_token_NT = torch.arange(rows_NT.shape[1], device=rows_NT.device) < lengths_N[:, None]
    return rows_NT[is_token_NT][None]

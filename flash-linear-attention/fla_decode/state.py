"""What a state is stored as between two steps.

``float32``, ``bfloat16``, ``float16``: a tensor ``[B, W, K, V]`` or ``[B, W, V, K]``, each number rounded to nearest,
ties to even. float16 reaches 65,504 and bfloat16 as far as float32, with 11 and 8 bits.

``int8``: a row is the K numbers of one value channel of a head, and each has a scale, float32: the largest magnitude
in the row over 127. A number is ``code * scale``, and its code the whole number nearest to ``number / scale``, ties to
even, within -127 and 127. A row of zeros has scale 0. A row is read and written by ``u = beta (v - S^T k)`` as a whole,
so whoever writes one channel knows its scale, and the codes lie as ``[B, W, V, K]``, a row in one piece. A state takes
``V (K + 4)`` bytes a head.

Shapes: B sequences, W value heads, K key channels, V value channels.
"""

from typing import NamedTuple

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MOST = 127  # the largest code


class Int8State(NamedTuple):
    """A state in int8: codes ``[B, W, V, K]``, int8, and the scale of each row, ``[B, W, V]``, float32."""

    codes_BWVK: torch.Tensor
    scales_BWV: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes_BWVK.nbytes + self.scales_BWV.nbytes


def quantize(state: torch.Tensor, *, state_v_first: bool = False) -> Int8State:
    """Return a state ``[B, W, K, V]``, or ``[B, W, V, K]`` with ``state_v_first``, in int8."""
    rows_BWVK = (state if state_v_first else state.mT).float()
    scales_BWV = rows_BWVK.abs().amax(-1) / MOST
    codes = rows_BWVK / scales_BWV.masked_fill(scales_BWV == 0, 1)[..., None]
    return Int8State(codes.round().to(torch.int8).contiguous(), scales_BWV)


def dequantize(state: Int8State, *, state_v_first: bool = False) -> torch.Tensor:
    """Return a state in int8 as float32, ``[B, W, K, V]``, or ``[B, W, V, K]`` with ``state_v_first``."""
    rows_BWVK = state.codes_BWVK * state.scales_BWV[..., None]
    return rows_BWVK if state_v_first else rows_BWVK.mT.contiguous()


def empty_state(shape_BWxx: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor | Int8State:
    """Return a state that nothing has been written to, in the layout of the given shape."""
    tensor = torch.empty(shape_BWxx, dtype=dtype, device=device)
    if dtype != torch.int8:
        return tensor
    return Int8State(tensor, torch.empty(shape_BWxx[:3], dtype=torch.float32, device=device))

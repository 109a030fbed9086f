"""What is read back of a state that was stored in one of the formats of ``keyreduce.serving.state_formats``.

All rounding is to the nearest, of a tie to even. A scale is the largest magnitude among the numbers that share it,
divided by the largest one of the format (127, 7, or the 448 of e4m3), in float32; zeros stay zeros.

Shapes: B rows, W value heads, K key channels, V value channels, R a part of the key channels.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F

from keyreduce.serving.state_formats import FORMATS

_PLAIN = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_AXES = {"row": -2, "key": -1, "head": (-2, -1)}
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
# dtype -> the integer of its size, the bits of the exponent, and how many bits follow them.
_BITS = {torch.float32: (torch.int32, 0x7F800000, 23), torch.float64: (torch.int64, 0x7FF << 52, 52)}
_E4M3_BITS, _E4M3_LEAST = 3, 2.0**-6  # the bits of its mantissa, and its least number that is not subnormal


def storing(names: Sequence[str]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a function that stores states ``[B, W, K, V]`` of a layer and reads them back; None if nothing changes.

    ``names`` are the formats of its W value heads. The function may overwrite the state that it is given.
    """
    if len(set(names)) == 1:
        name = names[0]
        return None if name == "float32" else lambda state_BWKV: round_state(state_BWKV, name)
    kinds = [name for name in dict.fromkeys(names) if name != "float32"]
    heads = {name: torch.tensor([head for head, own in enumerate(names) if own == name]) for name in kinds}

    def store(state_BWKV: torch.Tensor) -> torch.Tensor:
        for name in kinds:
            own = heads[name] = heads[name].to(state_BWKV.device)
            state_BWKV[:, own] = round_state(state_BWKV[:, own], name)
        return state_BWKV

    return store


def round_state(state_BWKV: torch.Tensor, name: str) -> torch.Tensor:
    """Return float32 or float64 states as they are read back after they were stored; of a format without scales, what
    it cannot hold becomes infinite."""
    if name == "float32":
        return state_BWKV
    form = FORMATS[name]
    if form.scaled is None:
        return state_BWKV.to(_PLAIN[name]).to(state_BWKV.dtype)
    kind = name.partition("-")[0]
    if form.rotated:
        rotation_KK = _rotation(state_BWKV.shape[-2], state_BWKV.dtype, state_BWKV.device)
        return rotation_KK @ _scaled(rotation_KK @ state_BWKV, kind, -2)
    axes = _AXES[form.scaled]
    return _scaled(state_BWKV, kind, axes) if form.group is None else _in_groups(state_BWKV, kind, axes, form.group)


def _in_groups(state_BWKV: torch.Tensor, kind: str, axis: int, group: int) -> torch.Tensor:
    """Round with a scale for every ``group`` neighbours along an axis; the last group may be smaller."""
    length = state_BWKV.shape[axis]
    padding = (0, 0, 0, -length % group) if axis == -2 else (0, -length % group)
    grouped = F.pad(state_BWKV, padding).unflatten(axis, (-1, group))
    return _scaled(grouped, kind, axis).flatten(axis - 1, axis).narrow(axis, 0, length)


def _scaled(values: torch.Tensor, kind: str, together: int | tuple[int, ...]) -> torch.Tensor:
    """Round values that share a scale along the axes ``together``."""
    scale = values.abs().amax(together, keepdim=True).div_(_LARGEST[kind])
    # Where all are zero, any scale gives zero back.
    scale = torch.where(scale > 0, scale, 1.0)
    return _rounded(values / scale, kind).mul_(scale)


def _rounded(values: torch.Tensor, kind: str) -> torch.Tensor:
    """Round in place to integers, or to e4m3, of which no magnitude is beyond the largest."""
    if kind != "fp8":
        return values.round_()
    # In place of a cast there and back, which PyTorch does slowly on a CPU: to add and subtract a number so large that
    # the sum has no finer digits than e4m3 at this exponent.
    integer, exponent, digits = _BITS[values.dtype]
    power = values.view(integer).bitwise_and(exponent).view(values.dtype).clamp_(min=_E4M3_LEAST)
    rounder = power.mul_(1.5 * 2.0 ** (digits - _E4M3_BITS))
    return values.add_(rounder).sub_(rounder)


@cache
def _rotation(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a symmetric orthogonal matrix: normalised Hadamard ones of the largest power of two that divides K."""
    block = torch.ones(1, 1, dtype=torch.float64)
    width = size & -size
    while len(block) < width:
        block = torch.cat([torch.cat([block, block], dim=1), torch.cat([block, -block], dim=1)])
    whole = torch.block_diag(*[block / math.sqrt(width)] * (size // width))
    return whole.to(device=device, dtype=dtype)

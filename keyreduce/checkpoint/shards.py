"""What safetensors files hold, and their headers, read and checked.

The format, https://github.com/huggingface/safetensors#format: an 8-byte little-endian length, a JSON object of
that length which gives each tensor's dtype, shape and byte range, then the bytes.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from keyreduce.errors import KeyreduceError

if TYPE_CHECKING:
    import torch  # headers are read without it: it takes a second to import

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}
"""What torch calls a dtype -> what a safetensors header calls it."""
# Torch has no 6-bit types and holds F4 in pairs, but a file may have them, and they can be copied.
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= {name: int(name.strip("BCFIU").split("_")[0]) for name in _TORCH_NAMES if name not in _BITS}

# Whatever has fewer bits, or none behind the point, stands for other numbers.
PLAIN = ("F64", "F32", "F16", "BF16")
# What quantisers call the tensors that they put beside a weight.
COMPANION = re.compile(r"(scale|zero|qweight|pack|g_idx)[^.]*$")

# The limit that the safetensors library sets.
_MAX_HEADER_BYTES = 100_000_000


class TensorSpec(NamedTuple):
    """What a header says of a tensor: name, dtype by its safetensors name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """The bits of one number."""
        return _BITS[self.dtype]

    @property
    def nbytes(self) -> int:
        """The bytes of all numbers."""
        return self.bits * math.prod(self.shape) // 8


class ShardPlan(NamedTuple):
    """What a file holds, or is to hold: its tensors in order, and its header's free-form metadata."""

    tensors: Sequence[TensorSpec]
    metadata: Mapping[str, str]


class ByteRange(NamedTuple):
    """Bytes [begin, end) of a file."""

    path: Path
    begin: int
    end: int


@functools.cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """Return safetensors' name of a dtype -> torch's dtype, for all that torch has."""
    import torch

    return {name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items()}


def make_spec(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorSpec:
    """Describe a torch tensor as a safetensors header does. Raises KeyreduceError if safetensors has no such dtype."""
    found = SAFETENSORS_NAMES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise KeyreduceError(f"tensor {name!r} is {dtype}, which safetensors cannot hold; convert it to another dtype")
    shape = tuple(shape)
    if found == "F4":
        # Torch counts pairs along the last axis, safetensors counts single numbers.
        shape = (*shape[:-1], 2 * shape[-1])
    return TensorSpec(name, found, shape)


def torch_layout(spec: TensorSpec) -> dict[str, Any]:
    """Return ``dtype`` and ``size`` of a tensor as torch has them: :func:`make_spec` the other way round.

    Raises KeyreduceError if torch has no such dtype.
    """
    if spec.dtype not in _TORCH_NAMES:
        raise KeyreduceError(f"tensor {spec.name!r} is {spec.dtype}, which torch cannot hold")
    size = spec.shape
    if spec.dtype == "F4" and size:
        size = (*size[:-1], size[-1] // 2)
    return {"dtype": torch_dtypes()[spec.dtype], "size": size}


def read_header(path: Path) -> tuple[ShardPlan, dict[str, ByteRange]]:
    """Return what a safetensors file holds, and tensor name -> its bytes, from a header that fits the file's size.

    Whatever the safetensors library refuses is refused here, with the name of the file and of the tensor.

    Raises KeyreduceError if the file is missing, unreadable or truncated, or its header is not valid.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a file of {size} bytes cannot hold a header of {length}")
            return _parse_header(path, file.read(length), size)
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise KeyreduceError(
            f"{path} is not a valid safetensors file: it may be truncated, get it again ({error})"
        ) from None


def _parse_header(path: Path, raw: bytes, size: int) -> tuple[ShardPlan, dict[str, ByteRange]]:
    """Parse a header's JSON; a ValueError says what is wrong with it."""
    if not raw.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    content = json.loads(raw.decode(), object_pairs_hook=_refuse_duplicates)
    # Python's JSON lets a lone surrogate pass; UTF-8, and so safetensors, does not.
    json.dumps(content, ensure_ascii=False).encode()
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ does not map strings to strings")
    described = sorted((_parse_entry(name, info) for name, info in content.items()), key=lambda one: one[1:])
    position = start = 8 + len(raw)
    for spec, begin, end in described:
        if start + begin != position:
            raise ValueError(f"tensor {spec.name!r} begins at byte {start + begin} and not at {position}")
        position = start + end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} and the file at {size}")
    ranges = {spec.name: ByteRange(path, start + begin, start + end) for spec, begin, end in described}
    return ShardPlan([spec for spec, _, _ in described], metadata), ranges


def _parse_entry(name: str, info: object) -> tuple[TensorSpec, int, int]:
    """Return a tensor, and where its bytes begin and end after the header."""
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the shape or the data_offsets of tensor {name!r} are not lists of whole numbers")
    if math.prod(size for size in shape if size) >= 1 << 63:
        raise ValueError(f"tensor {name!r} has an impossible shape")
    begin, end = offsets
    if 8 * (end - begin) != _BITS[dtype] * math.prod(shape):
        raise ValueError(f"tensor {name!r}, {dtype} of shape {shape}, does not take {end - begin} bytes")
    return TensorSpec(name, dtype, tuple(shape)), begin, end


def _are_counts(values: object) -> bool:
    # JSON's true is an int for Python, so isinstance would not do.
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"it names {name!r} twice")
        unique[name] = value
    return unique

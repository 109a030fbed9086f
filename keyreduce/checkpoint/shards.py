"""One safetensors file as a stream: its header read and checked, its tensors written one after another.

The format, https://github.com/huggingface/safetensors#format: an 8-byte little-endian length, a JSON object of
that length which gives each tensor's dtype, shape and byte range, then the bytes. The safetensors library writes
a file from all of its tensors at once; here a file is made with no more than one tensor in memory, and a tensor
that does not change is copied from file to file without being looked at.
"""

import contextlib
import errno
import io
import json
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from keyreduce.errors import KeyreduceError

TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F4": torch.float4_e2m1fn_x2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
# Torch has no 6-bit types and holds F4 in pairs, but a file may have them, and they can be copied.
_BITS = {name: 8 * dtype.itemsize for name, dtype in TORCH_DTYPES.items()} | {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

# The limit that the safetensors library sets.
_MAX_HEADER_BYTES = 100_000_000
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor: dtype by its safetensors name, shape, and bytes [begin, end) of the FILE."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of one file: entries in the order of their bytes, free-form metadata, where the data starts."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int


class TensorSpec(NamedTuple):
    """A tensor that is to be written: name, dtype by its safetensors name, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return _count_bits(self.dtype, self.shape) // 8


class ByteRange(NamedTuple):
    """Bytes [begin, end) of a file."""

    path: Path
    begin: int
    end: int


def make_spec(name: str, dtype: torch.dtype, shape: Sequence[int]) -> TensorSpec:
    """Describe a torch tensor as a safetensors header does.

    Raises:
        KeyreduceError: safetensors has no such dtype.
    """
    if dtype not in _NAMES:
        raise KeyreduceError(f"tensor {name!r} is {dtype}, which safetensors cannot hold; convert it to another dtype")
    shape = tuple(shape)
    if dtype == torch.float4_e2m1fn_x2:
        # Torch counts pairs along the last axis, safetensors counts single numbers.
        shape = (*shape[:-1], 2 * shape[-1])
    return TensorSpec(name, _NAMES[dtype], shape)


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file and check it against the file's size.

    Whatever the safetensors library refuses is refused here, with the name of the file and of the tensor.

    Raises:
        KeyreduceError: the file is missing, unreadable or truncated, or its header is not valid.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a file of {size} bytes cannot hold a header of {length}")
            return _parse_header(file.read(length), size)
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise KeyreduceError(
            f"{path} is not a valid safetensors file: it may be truncated, get it again ({error})"
        ) from None


class ShardWriter:
    """Write one safetensors file tensor by tensor, in the order given. A context manager.

    Args:
        path: the file to make.
        tensors: what will be written, in order.
        metadata: free-form strings for the header, such as ``{"format": "pt"}``.

    Raises:
        KeyreduceError: the file cannot be written.
        ValueError: what is written is not what was announced, or, at the end, not all of it.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None):
        self.path = path
        self._pending = deque(tensors)
        self._header = _format_header(tensors, metadata or {})
        self._file: io.FileIO | None = None

    def __enter__(self) -> "ShardWriter":
        with _writing(self.path):
            self._file = open(self.path, "wb", buffering=0)
            _write_all(self._file, memoryview(self._header))
        return self

    def write(self, name: str, data: torch.Tensor | ByteRange) -> None:
        """Write the next tensor, from memory or as a range of bytes copied from another file."""
        if not self._pending or self._pending[0].name != name:
            raise ValueError(f"{self.path}: it is not the turn of tensor {name!r}")
        spec = self._pending.popleft()
        if isinstance(data, ByteRange):
            if data.end - data.begin != spec.nbytes:
                raise ValueError(f"tensor {name!r} takes {spec.nbytes} bytes, not {data.end - data.begin}")
            with _writing(self.path), open(data.path, "rb", buffering=0) as source:
                _copy_range(source, self._file, data.begin, data.end)
        else:
            if make_spec(name, data.dtype, data.shape) != spec:
                raise ValueError(f"{spec} was announced, not {data.dtype} {tuple(data.shape)}")
            raw = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            with _writing(self.path):
                _write_all(self._file, memoryview(raw))

    def __exit__(self, exception_type, exception, traceback) -> None:
        with self._file:
            if exception_type is not None:
                return
            if self._pending:
                raise ValueError(f"{self.path}: tensor {self._pending[0].name!r} was not written")
            with _writing(self.path):
                os.fsync(self._file.fileno())


def _count_bits(dtype: str, shape: tuple[int, ...]) -> int:
    return _BITS[dtype] * math.prod(shape)


def _parse_header(raw: bytes, size: int) -> Header:
    """Parse a header's JSON; a ValueError says what is wrong with it."""
    if not raw.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    content = json.loads(raw.decode(), object_pairs_hook=_refuse_duplicates)
    # Python's JSON lets a lone surrogate pass; UTF-8, and so safetensors, does not.
    json.dumps(content, ensure_ascii=False).encode()
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ does not map strings to strings")
    data_start = 8 + len(raw)
    parsed = {name: _parse_entry(name, info, data_start) for name, info in content.items()}
    entries = dict(sorted(parsed.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = data_start
    for name, entry in entries.items():
        if entry.begin != position:
            raise ValueError(f"tensor {name!r} begins at byte {entry.begin} and not at {position}")
        position = entry.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position} and the file at {size}")
    return Header(entries, metadata, data_start)


def _parse_entry(name: str, info: object, data_start: int) -> TensorEntry:
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
    if 8 * (end - begin) != _count_bits(dtype, shape):
        raise ValueError(f"tensor {name!r}, {dtype} of shape {shape}, does not take {end - begin} bytes")
    return TensorEntry(dtype, tuple(shape), data_start + begin, data_start + end)


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


def _format_header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON, padded with spaces so that the data starts at a multiple of 8 bytes."""
    content: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for spec in tensors:
        if spec.name in content:
            raise ValueError(f"tensor {spec.name!r} is announced twice")
        end = position + spec.nbytes
        content[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise KeyreduceError(f"cannot write {path}: {error.strerror}") from error


def _write_all(file: io.FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _copy_range(source: io.FileIO, target: io.FileIO, begin: int, end: int) -> None:
    """Append bytes [begin, end) of ``source`` to ``target``: by the kernel where it can, else in pieces."""
    if hasattr(os, "copy_file_range"):
        try:
            while begin < end and (copied := os.copy_file_range(source.fileno(), target.fileno(), end - begin, begin)):
                begin += copied
        except OSError:
            # Not every pair of file systems can. If the cause is another one, such as a full disk, the ordinary
            # copy below meets it again and reports it.
            pass
    source.seek(begin)
    while begin < end:
        piece = source.read(min(_COPY_BYTES, end - begin))
        if not piece:
            raise OSError(errno.EIO, f"{source.name} ended early; it was changed while it was read")
        _write_all(target, memoryview(piece))
        begin += len(piece)

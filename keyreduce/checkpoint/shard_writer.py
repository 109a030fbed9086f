"""One safetensors file being written, its tensors one after another."""

import contextlib
import errno
import io
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from keyreduce.checkpoint.shards import ByteRange, TensorSpec, make_spec
from keyreduce.errors import KeyreduceError

_COPY_BYTES = 1 << 24


class ShardWriter:
    """Write one safetensors file tensor by tensor, in the order given. A context manager.

    As ``cp`` and the safetensors library do, it leaves to the system when the disk gets what was written.

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

    def __enter__(self) -> "ShardWriter":
        with writing(self.path):
            self._file = open(self.path, "wb", buffering=0)
            write_all(self._file, memoryview(self._header))
        return self

    def tell(self) -> int:
        """Return how many bytes of the file are written, and will not change any more."""
        return self._file.tell()

    def write(self, name: str, data: torch.Tensor | Sequence[ByteRange]) -> None:
        """Write the next tensor, from memory or as bytes copied from other files."""
        if not self._pending or self._pending[0].name != name:
            raise ValueError(f"{self.path}: it is not the turn of tensor {name!r}")
        spec = self._pending.popleft()
        if not isinstance(data, torch.Tensor):
            if (size := sum(piece.end - piece.begin for piece in data)) != spec.nbytes:
                raise ValueError(f"tensor {name!r} takes {spec.nbytes} bytes, not {size}")
            for piece in data:
                with writing(self.path), open(piece.path, "rb", buffering=0) as source:
                    copy_range(source, self._file, piece.begin, piece.end)
        else:
            if make_spec(name, data.dtype, data.shape) != spec:
                raise ValueError(f"{spec} was announced, not {data.dtype} {tuple(data.shape)}")
            raw = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            with writing(self.path):
                write_all(self._file, memoryview(raw))

    def __exit__(self, exception_type, exception, traceback) -> None:
        with self._file:
            if exception_type is not None:
                return
            if self._pending:
                raise ValueError(f"{self.path}: tensor {self._pending[0].name!r} was not written")


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
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of the system into one line that says which file could not be written."""
    try:
        yield
    except OSError as error:
        raise KeyreduceError(f"cannot write {path}: {error.strerror}") from error


def write_all(file: io.FileIO, data: memoryview) -> None:
    """Write all of ``data`` to an unbuffered file, which may take it in pieces."""
    while data:
        data = data[file.write(data) :]


def copy_range(source: io.FileIO, target: io.FileIO, begin: int, end: int) -> None:
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
        write_all(target, memoryview(piece))
        begin += len(piece)

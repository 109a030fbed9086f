"""A checkpoint that is read from, whatever files its tensors lie in."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from keyreduce.checkpoint.shards import ByteRange, ShardPlan, TensorSpec
from keyreduce.errors import KeyreduceError

if TYPE_CHECKING:
    import torch  # headers are read without it

METADATA_NAME = ".metadata"  # the file by which a folder is a DCP

# config.json holds these, and they change without the model changing.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path")

_BLOCK_BYTES = 4096
_BLOCKS = 1024
_COMPARED_BYTES = 2**24


class Checkpoint(ABC):
    """An open checkpoint. Only what describes its tensors is in memory; they are read when asked for.

    Attributes:
        path: its folder.
        config: the content of config.json.
        tensors: tensor name -> name, dtype and shape, in the order in which reading is cheapest.
        files: the files that hold the tensors.
        shards: how the tensors lie in safetensors files, by file name; None where they lie in files of another kind.
    """

    path: Path
    config: dict
    tensors: dict[str, TensorSpec]
    shards: Mapping[str, ShardPlan] | None

    def __init__(self, files: Iterable[Path]):
        self.files = tuple(files)
        self._stamps = {path: _stamp(path) for path in self.files}

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Raises KeyreduceError if the checkpoint has no such tensor, it cannot be read, or torch has no such dtype.
        """

    @abstractmethod
    def ranges(self, name: str) -> tuple[ByteRange, ...] | None:
        """Return the bytes of files that, put together, are the tensor's numbers, row by row; None if no bytes are.

        Raises KeyreduceError if the checkpoint has no such tensor, or what describes it is damaged.
        """

    @property
    @abstractmethod
    def sidecars(self) -> tuple[Path, ...]:
        """The files that a copy of this model should have too: tokenizer, generation config, and the like."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: spec.shape for name, spec in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @cached_property
    def identity(self) -> str:
        """A SHA-256, in hex, by which to tell this model from another one, in whatever files either lies.

        It covers the config, every tensor's name, dtype and shape, and 1,024 blocks of 4 KiB, evenly spaced over all
        tensors in the order of their names. So it takes milliseconds at any size; a change to a few numbers between
        two blocks escapes it.
        """
        config = {key: value for key, value in self.config.items() if key not in _NOT_THE_MODEL}
        specs = sorted(self.tensors.values())
        digest = hashlib.sha256(json.dumps([config, specs], sort_keys=True).encode())
        for name, begin, end in _sampled(specs):
            digest.update(self._read_bytes(name, begin, end))
        return digest.hexdigest()

    def refuse_changed(self) -> None:
        """Make sure that nobody wrote into the checkpoint while it was being read.

        Raises KeyreduceError if a file is not the one that was opened.
        """
        for path, before in self._stamps.items():
            if _stamp(path) != before:
                raise KeyreduceError(f"{path} was changed while it was read; start again when it is complete")

    def are_same(self, one: str, other: str) -> bool:
        """Return whether two tensors are of one dtype and shape, and hold the same numbers."""
        if self.tensors[one][1:] != self.tensors[other][1:]:
            return False
        ranges = self.ranges(one), self.ranges(other)
        if None in ranges:
            return self.read(one).equal(self.read(other))
        # Two names may lead to the same bytes. Others are compared piece by piece.
        begins = range(0, 0 if ranges[0] == ranges[1] else self.tensors[one].nbytes, _COMPARED_BYTES)
        pieces = ((begin, begin + _COMPARED_BYTES) for begin in begins)
        return all(self._read_bytes(one, *piece) == self._read_bytes(other, *piece) for piece in pieces)

    def _read_bytes(self, name: str, begin: int, end: int) -> bytes:
        ranges = self.ranges(name)
        if ranges is None:
            import torch

            raw = self.read(name).contiguous().reshape(-1).view(torch.uint8)
            return raw[begin:end].numpy().tobytes()
        found = []
        for piece in ranges:
            length = piece.end - piece.begin
            if begin < length and end > 0:
                found.append(_read_piece(piece.path, piece.begin + max(begin, 0), piece.begin + min(end, length)))
            begin, end = begin - length, end - length
        return b"".join(found)


def _sampled(specs: Sequence[TensorSpec]) -> Iterator[tuple[str, int, int]]:
    """Yield name, begin and end of pieces of tensors: blocks spread evenly over all bytes, first and last included."""
    starts = list(itertools.accumulate((spec.nbytes for spec in specs), initial=0))
    room = max(starts[-1] - _BLOCK_BYTES, 0)
    count = min(_BLOCKS, 1 + math.ceil(room / _BLOCK_BYTES))
    for begin in (room * index // max(count - 1, 1) for index in range(count)):
        end = begin + _BLOCK_BYTES
        # A block may lie across several tensors.
        for index in range(bisect.bisect_right(starts, begin) - 1, bisect.bisect_left(starts, end)):
            if index < len(specs) and specs[index].nbytes:
                start, stop = starts[index : index + 2]
                yield specs[index].name, max(begin, start) - start, min(end, stop) - start


def _read_piece(path: Path, begin: int, end: int) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - begin, begin)
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written to or replaced."""
    try:
        status = os.stat(path)
    except OSError:
        return None  # what is missing is reported where it is opened
    return status.st_ino, status.st_size, status.st_mtime_ns

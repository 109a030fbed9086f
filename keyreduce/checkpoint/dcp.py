"""A torch distributed checkpoint (DCP) being written: any checkpoint, one tensor at a time.

Training frameworks such as flame and torchtitan read and write DCP: a folder of ``.distcp`` files and one
``.metadata``, usually called ``step-N``.
"""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, cast

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from keyreduce.checkpoint.checksums import FileHasher
from keyreduce.checkpoint.rewrite import EditedTensors, config_with_dtype
from keyreduce.checkpoint.shards import ByteRange, TensorSpec, torch_layout
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.checkpoint.tied import refuse_untied, tied_output
from keyreduce.checkpoint.writing import copy_ranges, write_all, write_folder_files, writing
from keyreduce.errors import KeyreduceError


def write_dcp(
    source: Checkpoint,
    target: Path,
    *,
    nested: bool = False,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Write a checkpoint as a DCP, config.json and what else belongs to the model beside it.

    Memory stays at about one tensor. An output layer that is the embeddings is there by both names, at no cost: they
    lead to the same bytes.

    Args:
        source: the checkpoint to read.
        target: an existing, empty folder.
        nested: whether the model's tensors lie under the key ``model``, as older flame and torchtitan have them, or
            flat under their own names.
        dtype: what floating-point tensors are cast to; None leaves them.
        progress: called for each tensor with the number of its bytes.

    Returns:
        File name -> its xxh3_128 in hex, of every ``.distcp`` file.

    Raises KeyreduceError if a tensor has a dtype that torch has not, the output layer is not the embeddings though the
    config says so, a file cannot be read or written, or somebody wrote into the source meanwhile.
    """
    refuse_untied(source, "if they are two, say false there, in its config.json")
    edited = EditedTensors(source, {}, dtype)
    # DCP plans from dtypes and shapes alone: the numbers are read when it is their turn.
    tied = tied_output(source.config, source.tensors)
    specs = {second: edited.tensors[first] for second, first in tied.items()} | edited.tensors
    described = {name: torch.empty(**torch_layout(spec), device="meta") for name, spec in specs.items()}
    write_folder_files(target, config_with_dtype(source.config, dtype), source.sidecars)
    with FileHasher() as hasher, _without_checksums(), in_one_process(f"cannot write {target}"):
        save(
            {"model": described} if nested else described,
            storage_writer=_StreamingWriter(target, specs, edited, nested, hasher, progress),
            no_dist=True,
        )
    source.refuse_changed()
    return hasher.checksums


class _StreamingWriter(FileSystemWriter):
    """DCP's own writer but for the numbers: they are fetched one tensor at a time, and copied as bytes where they can.

    As ``cp`` does, it leaves to the system when the disk gets what was written.
    """

    def __init__(
        self,
        target: Path,
        specs: Mapping[str, TensorSpec],
        edited: EditedTensors,
        nested: bool,
        hasher: FileHasher,
        progress: Callable[[int], None] | None,
    ):
        super().__init__(target, sync_files=False)
        self.specs, self.edited, self.nested = specs, edited, nested
        self.hasher, self.progress = hasher, progress

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name, results, places = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}", [], {}
        path = Path(self.path) / name
        with writing(path), open(path, "wb", buffering=0) as file:
            for item in plan.items:
                begin, key = file.tell(), item.index.fqn
                spec = self.specs[key.removeprefix("model.") if self.nested else key]
                if spec.name not in places:
                    _save(self.edited.fetch(spec.name), spec, file)
                    places[spec.name] = _StorageInfo(name, begin, file.tell() - begin)
                    self.hasher.written(path, file.tell())
                    if self.progress is not None:
                        self.progress(spec.nbytes)
                results.append(WriteResult(item.index, places[spec.name].length, places[spec.name]))
        written = Future()
        written.set_result(results)
        return written


def _save(data: torch.Tensor | Sequence[ByteRange], spec: TensorSpec, file: io.FileIO) -> None:
    """Append to a file what ``torch.save`` makes of a tensor, whose bytes may still be in other files."""
    if isinstance(data, torch.Tensor):
        torch.save(data, cast("IO[bytes]", _Gap(file)))
        return
    gap = _Gap(file)
    with torch.serialization.skip_data():
        torch.save(torch.empty(**torch_layout(spec)), cast("IO[bytes]", gap))  # of memory that nobody touches
    end = file.tell()
    if spec.nbytes:
        if gap.size != spec.nbytes:
            raise ValueError(f"torch.save left {gap.size} bytes for {spec}")
        file.seek(gap.begin)
        copy_ranges(data, file)
        file.seek(end)


class _Gap:
    """A file to ``torch.save`` into, which notes where it skipped the numbers of a tensor."""

    def __init__(self, file: io.FileIO):
        self.begin = self.size = 0
        self._file = file

    def write(self, data: bytes) -> int:
        write_all(self._file, memoryview(data))
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.begin, self.size = self._file.tell(), offset
        return self._file.seek(offset, whence)

    def flush(self) -> None:
        pass


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    # torch.save would spend half of the time on CRC-32 sums, which torch.load never looks at.
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextlib.contextmanager
def in_one_process(failure: str) -> Iterator[None]:
    """Run DCP in this process alone; turn its errors into one line that begins with ``failure``."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        # A BaseException, which wraps whatever was raised inside, Ctrl-C too.
        cause, _ = next(iter(error.failures.values()))
        if isinstance(cause, KeyreduceError) or not isinstance(cause, Exception):
            raise cause from None
        # Torch adds paragraphs of advice, some of it to turn safety off.
        reason = re.split(r"\. |\n", str(cause))[0]
        raise KeyreduceError(f"{failure}: {reason or type(cause).__name__}") from error

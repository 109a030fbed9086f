"""A torch distributed checkpoint (DCP) being written: any checkpoint, one tensor at a time.

Training frameworks such as flame and torchtitan read and write DCP: a folder of ``.distcp`` files and one
``.metadata``, usually called ``step-N``.
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from keyreduce.checkpoint.rewrite import EditedTensors, config_with_dtype
from keyreduce.checkpoint.shards import torch_layout
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.checkpoint.writing import write_folder_files
from keyreduce.errors import KeyreduceError


def write_dcp(
    source: Checkpoint,
    target: Path,
    *,
    nested: bool = False,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint as a DCP, config.json and what else belongs to the model beside it.

    Args:
        source: the checkpoint to read; memory stays at about one of its tensors.
        target: an existing, empty folder.
        nested: whether the model's tensors lie under the key ``model``, as older flame and torchtitan have them, or
            flat under their own names.
        dtype: what floating-point tensors are cast to; None leaves them.
        progress: called for each tensor with the number of its bytes.

    Raises:
        KeyreduceError: a tensor has a dtype that torch has not, a file cannot be read or written, or somebody wrote
            into the source meanwhile.
    """
    edited = EditedTensors(source, {}, dtype)
    # DCP plans from dtypes and shapes alone: the numbers are read when it is their turn.
    described = {name: torch.empty(**torch_layout(spec), device="meta") for name, spec in edited.tensors.items()}
    write_folder_files(target, config_with_dtype(source.config, dtype), source.sidecars)
    with _without_checksums(), in_one_process(f"cannot write {target}"):
        dcp.save(
            {"model": described} if nested else described,
            storage_writer=dcp.FileSystemWriter(target, sync_files=False),
            planner=_StreamingPlanner(edited, nested, progress),
            no_dist=True,
        )
    source.refuse_changed()


class _StreamingPlanner(dcp.DefaultSavePlanner):
    def __init__(self, edited: EditedTensors, nested: bool, progress: Callable[[int], None] | None):
        super().__init__()
        self.edited, self.nested, self.progress = edited, nested, progress

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        key = write_item.index.fqn
        tensor = self.edited.read(key.removeprefix("model.") if self.nested else key)
        if self.progress is not None:
            self.progress(tensor.nbytes)
        return tensor


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

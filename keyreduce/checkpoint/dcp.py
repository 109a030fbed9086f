"""Safetensors to torch distributed checkpoint (DCP) and back, one tensor at a time.

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
from huggingface_hub import split_state_dict_into_shards_factory
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from keyreduce.checkpoint.dcp_metadata import RestrictedReader, SavedTensor, find_model_tensors
from keyreduce.checkpoint.folder import (
    CONFIG_NAME,
    Checkpoint,
    ShardPlan,
    find_sidecars,
    write_folder_files,
    write_weights,
)
from keyreduce.checkpoint.shards import make_spec
from keyreduce.errors import KeyreduceError
from keyreduce.workspace import RECORD_NAME, read_json


def hf_to_dcp(source: Checkpoint, target: Path, *, progress: Callable[[int], None] | None = None) -> None:
    """Write a Hugging Face checkpoint as a DCP: the model's own tensor names as flat keys, config.json beside it.

    Tensors are mapped from their files, so it takes no memory to speak of at any size.

    Args:
        source: the checkpoint to read.
        target: an existing, empty folder.
        progress: called for each tensor with the number of its bytes.

    Raises:
        KeyreduceError: a tensor has a dtype that torch has not, or a file cannot be read or written.
    """
    _write_beside(target, source.config, source.path)
    with _single_process(f"cannot write {target}"):
        dcp.save(
            source.map_all(),
            storage_writer=dcp.FileSystemWriter(target),
            planner=_ReportingPlanner(progress),
            no_dist=True,
        )


def dcp_to_hf(
    source: Path,
    target: Path,
    *,
    config: Path | None = None,
    max_shard_size: int = 5 * 10**9,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write the model of a DCP as a Hugging Face checkpoint, with the dtypes and shapes it was saved with.

    Args:
        source: the DCP folder, the one that holds ``.metadata``.
        target: an existing, empty folder.
        config: a config.json, or a folder that holds one and the tokenizer; by default ``source`` itself.
        max_shard_size: the most bytes in a shard of several tensors. What fits makes one ``model.safetensors``.
        progress: called after each tensor with the number of its bytes.

    Raises:
        KeyreduceError: there is no config, the DCP is damaged, incomplete or holds no model, or a file cannot be
            written.
    """
    reader = RestrictedReader(source)
    tensors = find_model_tensors(source, reader.metadata)
    home = source if config is None else config
    if config is None and not (source / CONFIG_NAME).is_file():
        raise KeyreduceError(f"{source} has no {CONFIG_NAME}; pass the one of the model")
    content = read_json(home / CONFIG_NAME if home.is_dir() else home)

    specs = [make_spec(name, saved.dtype, saved.shape) for name, saved in tensors.items()]
    # As the safetensors library does: wide dtypes first, so that each tensor starts at a multiple of its width.
    specs.sort(key=lambda spec: -tensors[spec.name].dtype.itemsize)
    split = split_state_dict_into_shards_factory(
        {spec.name: spec.nbytes for spec in specs},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    by_name = {spec.name: spec for spec in specs}
    shards = {
        file: ShardPlan([by_name[name] for name in names], {"format": "pt"})
        for file, names in split.filename_to_tensors.items()
    }
    _write_beside(target, content, home if home.is_dir() else source)
    write_weights(
        target, shards, lambda name: _load(reader, tensors[name]), with_index=split.is_sharded, progress=progress
    )


class _ReportingPlanner(dcp.DefaultSavePlanner):
    def __init__(self, progress: Callable[[int], None] | None):
        super().__init__()
        self.progress = progress

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        tensor = super().resolve_data(write_item)
        if self.progress is not None:
            self.progress(tensor.nbytes)
        return tensor


def _write_beside(target: Path, config: dict, home: Path) -> None:
    """Write config.json, and copy the other small files of ``home``, the pruning record too."""
    record = home / RECORD_NAME
    write_folder_files(target, config, [*find_sidecars(home), *([record] if record.is_file() else [])])


def _load(reader: RestrictedReader, saved: SavedTensor) -> torch.Tensor:
    # DCP casts to the dtype of what it loads into, without a word: so that is the dtype that was saved.
    tensor = torch.empty(saved.shape, dtype=saved.dtype)
    # Keys are given as they were saved; flattening would only make each load walk over all of them.
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
    with _single_process(f"cannot read {saved.key!r} of {reader.path}, which may be damaged"):
        dcp.load({saved.key: tensor}, storage_reader=reader, planner=planner, no_dist=True)
    return tensor


@contextlib.contextmanager
def _single_process(failure: str) -> Iterator[None]:
    """Run DCP in this process alone; turn its errors into one line that begins with ``failure``."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        # A BaseException, which wraps whatever was raised inside, Ctrl-C too.
        cause, _ = next(iter(error.failures.values()))
        if not isinstance(cause, Exception):
            raise cause from None
        # Torch adds paragraphs of advice, some of it to turn safety off.
        reason = re.split(r"\. |\n", str(cause))[0]
        raise KeyreduceError(f"{failure}: {reason or type(cause).__name__}") from error

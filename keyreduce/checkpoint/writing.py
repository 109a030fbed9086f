"""A Hugging Face checkpoint folder being written: config.json, shards, index, and the small files beside them."""

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from keyreduce.checkpoint.checksums import FileHasher
from keyreduce.checkpoint.folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from keyreduce.checkpoint.shard_writer import ShardWriter
from keyreduce.checkpoint.shards import ByteRange, ShardPlan, TensorSpec, read_header
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import write_json

MAX_SHARD_SIZE = 5 * 10**9


def write_folder_files(target: Path, config: dict, sidecars: Iterable[Path]) -> None:
    """Write config.json and copy the files beside it into the folder ``target``.

    Raises:
        KeyreduceError: a file cannot be read or written.
    """
    write_json(target / CONFIG_NAME, config)
    for sidecar in sidecars:
        try:
            shutil.copyfile(sidecar, target / sidecar.name)
        except OSError as error:
            raise KeyreduceError(f"cannot copy {sidecar} to {target}: {error.strerror}") from error


def write_weights(
    target: Path,
    shards: Mapping[str, ShardPlan],
    fetch: Callable[[str], torch.Tensor | Sequence[ByteRange]],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Write safetensors shards into the folder ``target``, one tensor at a time, then read their headers back.

    Args:
        target: an existing folder.
        shards: file name -> what goes into it; an index is written unless it is the one file that needs none.
        fetch: gives a tensor by its name, or the bytes of files that hold it.
        progress: called after each tensor with the number of bytes written since the last call.

    Returns:
        File name -> its xxh3_128 in hex, of every shard.

    Raises:
        KeyreduceError: a file cannot be written, or reads back otherwise than it was written.
    """
    with FileHasher() as hasher:
        for file, plan in shards.items():
            with ShardWriter(target / file, plan.tensors, plan.metadata) as writer:
                for spec in plan.tensors:
                    writer.write(spec.name, fetch(spec.name))
                    hasher.written(target / file, writer.tell())
                    if progress is not None:
                        progress(spec.nbytes)
            entries = read_header(target / file).entries
            if [TensorSpec(name, entry.dtype, entry.shape) for name, entry in entries.items()] != list(plan.tensors):
                raise KeyreduceError(f"{target / file} does not read back as it was written; check the disk")
    if list(shards) != [SINGLE_NAME]:
        total_size = sum(spec.nbytes for plan in shards.values() for spec in plan.tensors)
        weight_map = {spec.name: file for file, plan in shards.items() for spec in plan.tensors}
        write_json(target / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return hasher.checksums


def split_into_shards(tensors: Mapping[str, TensorSpec], max_shard_size: int) -> dict[str, ShardPlan]:
    """Return file name -> what goes into it, one file or as many as it takes.

    Args:
        tensors: all tensors by name.
        max_shard_size: the most bytes in a file of several tensors.
    """
    # As the safetensors library does: wide dtypes first, so that each tensor starts at a multiple of its width.
    ordered = sorted(tensors.values(), key=lambda spec: -spec.bits)
    split = split_state_dict_into_shards_factory(
        {spec.name: spec.nbytes for spec in ordered},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return {
        file: ShardPlan([tensors[name] for name in names], {"format": "pt"})
        for file, names in split.filename_to_tensors.items()
    }


def parse_size(text: str) -> int:
    """Return the bytes that a text such as ``500MB`` or ``5GB`` says, in decimal units, as transformers counts them.

    Raises:
        KeyreduceError: it is no such text, or less than a byte.
    """
    match = re.fullmatch(r"([0-9]{1,12}) *([KMGT]?)B?", text.strip().upper())
    size = int(match[1]) * 1000 ** " KMGT".index(match[2] or " ") if match else 0
    if size < 1:
        raise KeyreduceError(f"{text!r} is no size of a shard; give one such as 500MB or 5GB")
    return size

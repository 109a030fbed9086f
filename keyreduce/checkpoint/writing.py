"""A Hugging Face checkpoint folder being written: config.json, shards, index, and the small files beside them.

No more than two tensors are in memory, the one that is written and the next one. A tensor that does not change is
copied from file to file without being looked at.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from keyreduce.checkpoint.checksums import FileHasher
from keyreduce.checkpoint.folder import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from keyreduce.checkpoint.shards import ByteRange, ShardPlan, TensorSpec, make_spec, read_header
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import write_json

Fetched = torch.Tensor | Sequence[ByteRange]
"""A tensor, or the bytes of files that hold it."""

MAX_SHARD_SIZE = 5 * 10**9
_COPY_BYTES = 1 << 24


def write_folder_files(target: Path, config: dict, sidecars: Iterable[Path]) -> None:
    """Write config.json into the folder ``target``, and copy the files that belong beside it.

    Raises KeyreduceError if a file cannot be read or written.
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
    fetch: Callable[[str], Fetched],
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

    Raises KeyreduceError if a file cannot be written, or reads back otherwise than it was written.
    """
    with FileHasher() as hasher:
        for file, plan in shards.items():
            path = target / file

            def written(spec: TensorSpec, end: int, path: Path = path) -> None:
                hasher.written(path, end)
                if progress is not None:
                    progress(spec.nbytes)

            write_shard(path, plan, fetch, written)
            if read_header(path)[0].tensors != list(plan.tensors):
                raise KeyreduceError(f"{path} does not read back as it was written; check the disk")
    if list(shards) != [SINGLE_NAME]:
        total_size = sum(spec.nbytes for plan in shards.values() for spec in plan.tensors)
        weight_map = {spec.name: file for file, plan in shards.items() for spec in plan.tensors}
        write_json(target / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    return hasher.checksums


def split_into_shards(tensors: Mapping[str, TensorSpec], max_shard_size: int) -> dict[str, ShardPlan]:
    """Return file name -> what goes into it, one file or as many as it takes.

    A file of several tensors has at most ``max_shard_size`` bytes.
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

    Raises KeyreduceError if it is no such text, or less than a byte.
    """
    match = re.fullmatch(r"([0-9]{1,12}) *([KMGT]?)B?", text.strip().upper())
    size = int(match[1]) * 1000 ** " KMGT".index(match[2] or " ") if match else 0
    if size < 1:
        raise KeyreduceError(f"{text!r} is not a shard size; give one such as 500MB or 5GB")
    return size


def write_shard(
    path: Path,
    plan: ShardPlan,
    fetch: Callable[[str], Fetched],
    written: Callable[[TensorSpec, int], None] = lambda spec, end: None,
) -> None:
    """Write one safetensors file, one tensor after another.

    The safetensors library writes a file from all of its tensors at once. As it does, and ``cp``, this leaves to the
    system when the disk gets what was written.

    Args:
        path: the file to make.
        plan: what goes into it, in order.
        fetch: gives a tensor by its name, or the bytes of files that hold it.
        written: called after each tensor with the number of bytes that will not change any more.

    Raises:
        KeyreduceError: the file cannot be written.
        ValueError: what is fetched is not what the plan says.
    """
    header = _format_header(plan)
    with writing(path):
        file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed below; errors of opening are reported here)
    with file:
        with writing(path):
            write_all(file, memoryview(header))
        for spec, data in zip(plan.tensors, _fetched_ahead(fetch, plan.tensors), strict=True):
            is_tensor = isinstance(data, torch.Tensor)
            if is_tensor and make_spec(spec.name, data.dtype, data.shape) != spec:
                raise ValueError(f"{spec} was announced, not {data.dtype} {tuple(data.shape)}")
            if not is_tensor and (size := sum(piece.end - piece.begin for piece in data)) != spec.nbytes:
                raise ValueError(f"tensor {spec.name!r} takes {spec.nbytes} bytes, not {size}")
            with writing(path):
                if is_tensor:
                    write_all(file, data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                else:
                    copy_ranges(data, file)
            written(spec, file.tell())


def _fetched_ahead(fetch: Callable[[str], Fetched], specs: Sequence[TensorSpec]) -> Iterator[Fetched]:
    """Yield what ``fetch`` gives for each tensor; the next one is read and edited while one is written."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        coming = None
        for spec in specs:
            current, coming = coming, pool.submit(fetch, spec.name)
            if current is not None:
                yield current.result()
        if coming is not None:
            yield coming.result()


def _format_header(plan: ShardPlan) -> bytes:
    """The length and the JSON, padded with spaces so that the data starts at a multiple of 8 bytes."""
    content: dict[str, object] = {"__metadata__": dict(plan.metadata)} if plan.metadata else {}
    position = 0
    for spec in plan.tensors:
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


def copy_ranges(ranges: Iterable[ByteRange], target: io.FileIO) -> None:
    """Append bytes of files to an unbuffered one."""
    for path, begin, end in ranges:
        with open(path, "rb", buffering=0) as source:
            _copy_range(source, target, begin, end)


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
        write_all(target, memoryview(piece))
        begin += len(piece)

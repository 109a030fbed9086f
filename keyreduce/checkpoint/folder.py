"""A Hugging Face checkpoint folder: config.json, safetensors shards, and the small files beside them."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from keyreduce.checkpoint.shards import ByteRange, Header, ShardWriter, TensorEntry, TensorSpec, read_header
from keyreduce.errors import KeyreduceError
from keyreduce.workspace import PROJECTIONS_NAME, read_json, write_json

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# What a loader may look for beside config.json and the weights. Code is carried with them, never run.
_SIDECARS = (
    "*.jinja",
    "*.model",
    "*.py",
    "*.tiktoken",
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    PROJECTIONS_NAME,
    "LICENSE*",
    "merges.txt",
    "NOTICE*",
    "*processor_config.json",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab*",
)

# config.json holds these, and they change without the model changing.
_NOT_THE_MODEL = ("transformers_version", "_name_or_path")

_BLOCK_BYTES = 4096
_BLOCKS = 64


@dataclass(frozen=True)
class Checkpoint:
    """An open Hugging Face folder. Only headers are in memory; tensors are read when asked for.

    Attributes:
        path: the folder.
        config: the content of config.json.
        headers: shard file name -> its header, in order.
        is_sharded: whether an index says which shard holds which tensor.
    """

    path: Path
    config: dict
    headers: dict[str, Header]
    is_sharded: bool

    @cached_property
    def entries(self) -> dict[str, tuple[str, TensorEntry]]:
        """Tensor name -> (shard file name, entry), in the order of the files and of their bytes."""
        return {name: (file, entry) for file, header in self.headers.items() for name, entry in header.entries.items()}

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the shards, in order."""
        return tuple(self.headers)

    @cached_property
    def sidecars(self) -> tuple[Path, ...]:
        """The files that a copy of this model should have too: tokenizer, generation config, and the like."""
        return find_sidecars(self.path)

    @cached_property
    def identity(self) -> str:
        """A SHA-256, in hex, by which to tell this checkpoint from another one.

        It covers the config, every header, and up to 64 blocks of 4 KiB of each shard, evenly spaced. So it takes
        milliseconds at any size and does not depend on where the folder is; a change to a few numbers between two
        blocks escapes it.
        """
        digest = hashlib.sha256()
        config = {key: value for key, value in self.config.items() if key not in _NOT_THE_MODEL}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for file, header in self.headers.items():
            described = [[name, e.dtype, e.shape, e.begin, e.end] for name, e in header.entries.items()]
            digest.update(json.dumps(described).encode())
            for block in sample_blocks(self.path / file, header.data_start):
                digest.update(block)
        return digest.hexdigest()

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from its file. The mapping goes with the tensor, so read one at a time.

        Raises:
            KeyreduceError: the checkpoint has no such tensor, or torch has no such dtype.
        """
        if name not in self.entries:
            raise KeyreduceError(f"{self.path} has no tensor {name!r}; its {CONFIG_NAME} is that of another model")
        return self._map(self.entries[name][0], [name])[name]

    def map_all(self) -> dict[str, torch.Tensor]:
        """Return all tensors, mapped: address space for the whole model, memory only for what is touched.

        Raises:
            KeyreduceError: torch has no such dtype.
        """
        mapped: dict[str, torch.Tensor] = {}
        for file, header in self.headers.items():
            mapped |= self._map(file, header.entries)
        return mapped

    def _map(self, file: str, names: Iterable[str]) -> dict[str, torch.Tensor]:
        try:
            with safe_open(str(self.path / file), framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise KeyreduceError(f"{self.path / file} cannot be read: {error}") from error


class ShardPlan(NamedTuple):
    """A shard that is to be written: its tensors in order, and its header's metadata."""

    tensors: Sequence[TensorSpec]
    metadata: Mapping[str, str]


def open_folder(path: Path) -> Checkpoint:
    """Open a Hugging Face folder and check config, index and headers against each other.

    Raises:
        KeyreduceError: there is no such folder, it holds no safetensors checkpoint, or the checkpoint is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise KeyreduceError(f"there is no folder {path}")
    if not (path / CONFIG_NAME).is_file():
        raise KeyreduceError(f"{path} has no {CONFIG_NAME}: it is not a Hugging Face checkpoint")
    config = read_json(path / CONFIG_NAME)
    # Where a folder has both, transformers too takes the single file.
    if (path / SINGLE_NAME).is_file():
        weight_map, files = None, [SINGLE_NAME]
    elif (path / INDEX_NAME).is_file():
        weight_map = _read_weight_map(path)
        files = sorted(set(weight_map.values()))
        for file in files:
            if not (path / file).is_file():
                raise KeyreduceError(f"{path} has no {file}, which {INDEX_NAME} names; get the rest of the checkpoint")
    else:
        convert = "; convert its .bin weights to safetensors first" if any(path.glob("*.bin")) else ""
        raise KeyreduceError(f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}{convert}")
    headers = {file: read_header(path / file) for file in files}
    if not any(header.entries for header in headers.values()):
        raise KeyreduceError(f"{path} holds no tensors")
    if weight_map is not None:
        _check_index(path, weight_map, headers)
    return Checkpoint(path, config, headers, is_sharded=weight_map is not None)


def find_sidecars(folder: Path) -> tuple[Path, ...]:
    """Return the files of ``folder`` that belong to its model beside config.json and the weights, by name."""
    return tuple(sorted({path for pattern in _SIDECARS for path in folder.glob(pattern) if path.is_file()}))


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
    fetch: Callable[[str], torch.Tensor | ByteRange],
    *,
    with_index: bool,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write safetensors shards into the folder ``target``, one tensor at a time, then read their headers back.

    Args:
        target: an existing folder.
        shards: file name -> what goes into it.
        fetch: gives a tensor by its name, or the bytes of a file that hold it.
        with_index: whether to write the index, which several shards need.
        progress: called after each tensor with the number of bytes written since the last call.

    Raises:
        KeyreduceError: a file cannot be written, or reads back otherwise than it was written.
    """
    for file, plan in shards.items():
        with ShardWriter(target / file, plan.tensors, plan.metadata) as writer:
            for spec in plan.tensors:
                writer.write(spec.name, fetch(spec.name))
                if progress is not None:
                    progress(spec.nbytes)
        entries = read_header(target / file).entries
        if [TensorSpec(name, entry.dtype, entry.shape) for name, entry in entries.items()] != list(plan.tensors):
            raise KeyreduceError(f"{target / file} does not read back as it was written; check the disk")
    if with_index:
        total_size = sum(spec.nbytes for plan in shards.values() for spec in plan.tensors)
        weight_map = {spec.name: file for file, plan in shards.items() for spec in plan.tensors}
        write_json(target / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


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


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise KeyreduceError(f"{path / INDEX_NAME} has no weight_map")
    for name, file in weight_map.items():
        # A path that leads elsewhere could make us read, and name our output after, any file of the machine.
        if not isinstance(file, str) or Path(file).name != file or file == "..":
            raise KeyreduceError(f"{path / INDEX_NAME} puts tensor {name!r} into {file!r}, not a file of its folder")
    return weight_map


def _check_index(path: Path, weight_map: dict[str, str], headers: dict[str, Header]) -> None:
    listed: dict[str, set[str]] = {file: set() for file in headers}
    for name, file in weight_map.items():
        listed[file].add(name)
    for file, header in headers.items():
        if differing := listed[file] ^ header.entries.keys():
            raise KeyreduceError(
                f"{path / INDEX_NAME} and {file} disagree about tensor {min(differing)!r}; get both again"
            )


def sample_blocks(path: Path, begin: int) -> Iterable[bytes]:
    """Yield up to 64 blocks, the first and the last among them, of the bytes of ``path`` from ``begin`` on."""
    with open(path, "rb") as file:
        room = max(path.stat().st_size - begin - _BLOCK_BYTES, 0)
        count = min(_BLOCKS, 1 + math.ceil(room / _BLOCK_BYTES))
        for index in range(count):
            file.seek(begin + room * index // max(count - 1, 1))
            yield file.read(_BLOCK_BYTES)

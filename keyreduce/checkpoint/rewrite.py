"""A checkpoint made into another one, tensor by tensor, without building a model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from keyreduce.checkpoint.folder import Checkpoint, ShardPlan, write_folder_files, write_weights
from keyreduce.checkpoint.shards import ByteRange, TensorSpec
from keyreduce.errors import KeyreduceError

_EDITABLE = ("F64", "F32", "F16", "BF16")


class Edit(Protocol):
    """A change to one tensor. It keeps the dtype, and does not write into the tensor it is given."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a tensor of ``shape`` will have: headers are written before data."""

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the changed tensor, of that shape."""


def rewrite(
    source: Checkpoint,
    target: Path,
    *,
    config: dict,
    edits: Mapping[str, Sequence[Edit]],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write ``source`` into the folder ``target`` with ``edits`` made and ``config`` as its config.json.

    Shards keep their names and the order of their tensors. Tensors without edits are copied as bytes; the others
    are read, changed and written one at a time, so that memory stays at about one tensor.

    Args:
        source: the checkpoint to read.
        target: an existing, empty folder.
        config: the config of the new checkpoint.
        edits: tensor name -> its changes, made in order.
        progress: called after each tensor with the number of bytes written since the last call.

    Raises:
        KeyreduceError: an edited tensor is missing, quantized, or holds NaN or inf, or a file cannot be written.
    """
    for name in edits:
        if name not in source.entries:
            raise KeyreduceError(f"{source.path} has no tensor {name!r}, which is to be changed")
        dtype = source.entries[name][1].dtype
        if edits[name] and dtype not in _EDITABLE:
            raise KeyreduceError(f"tensor {name!r} of {source.path} is {dtype}; take an unquantized checkpoint")

    def plan(file: str) -> ShardPlan:
        specs = []
        for name, entry in source.headers[file].entries.items():
            shape = entry.shape
            for edit in edits.get(name, ()):
                shape = edit.shape(shape)
            specs.append(TensorSpec(name, entry.dtype, tuple(shape)))
        return ShardPlan(specs, source.headers[file].metadata)

    def fetch(name: str) -> torch.Tensor | ByteRange:
        if not edits.get(name):
            file, entry = source.entries[name]
            return ByteRange(source.path / file, entry.begin, entry.end)
        tensor = source.read(name)
        for edit in edits[name]:
            tensor = edit.apply(tensor)
        if not _is_finite(tensor):
            raise KeyreduceError(f"tensor {name!r} of {source.path} holds NaN or inf after its edits: is it damaged?")
        return tensor

    write_folder_files(target, config, source.sidecars)
    shards = {file: plan(file) for file in source.files}
    write_weights(target, shards, fetch, with_index=source.is_sharded, progress=progress)


def _is_finite(tensor: torch.Tensor) -> bool:
    # aminmax passes NaN and inf on and, unlike isfinite, makes no tensor as large as its argument.
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))

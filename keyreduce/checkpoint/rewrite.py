"""A checkpoint made into another one, tensor by tensor, without building a model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from keyreduce.checkpoint.shards import COMPANION, PLAIN, ByteRange, TensorSpec, make_spec, torch_dtypes
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.checkpoint.writing import MAX_SHARD_SIZE, split_into_shards, write_folder_files, write_weights
from keyreduce.errors import KeyreduceError


class Edit(Protocol):
    """A change to one tensor. It keeps the dtype, and does not write into the tensor it is given."""

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a tensor of ``shape`` will have: headers are written before data."""
        ...

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the changed tensor, of that shape."""
        ...


class EditedTensors:
    """The tensors of a checkpoint as they will be, made one at a time when they are asked for.

    ``tensors`` is name -> name, dtype and shape after the edits, in the order of the source.

    Args:
        source: the checkpoint to read.
        edits: tensor name -> its changes, made in order.
        dtype: what floating-point tensors are cast to, after their edits; None leaves them. Numbers of 8 bits and
            fewer are quantized, and stay, and so do the scales beside them.

    Raises KeyreduceError if an edited tensor is missing or quantized.
    """

    def __init__(self, source: Checkpoint, edits: Mapping[str, Sequence[Edit]], dtype: torch.dtype | None = None):
        self._source, self._edits, self._dtype = source, edits, dtype
        for name in edits:
            if name not in source.tensors:
                raise KeyreduceError(f"{source.path} has no tensor {name!r}, which is to be changed")
            kind = source.tensors[name].dtype
            if edits[name] and kind not in PLAIN:
                raise KeyreduceError(f"tensor {name!r} of {source.path} is {kind}; take an unquantized checkpoint")
        # The modules with a quantized tensor: a scale that is rounded makes all of its block other numbers.
        quantized = {name.rpartition(".")[0] for name, spec in source.tensors.items() if spec.dtype not in PLAIN}
        self._scales = {
            name
            for name in source.tensors
            if name.rpartition(".")[0] in quantized and COMPANION.search(name.rpartition(".")[2])
        }
        self.tensors = {name: self._describe(spec) for name, spec in source.tensors.items()}

    def fetch(self, name: str) -> torch.Tensor | tuple[ByteRange, ...]:
        """Return a tensor as :meth:`read` does, or the bytes that hold it already, where nothing changes in them."""
        ranges = None if self._changes(name) else self._source.ranges(name)
        return self.read(name) if ranges is None else ranges

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor. Raises KeyreduceError if it cannot be read, or holds NaN or inf after its changes."""
        tensor = self._source.read(name)
        if not self._changes(name):
            return tensor
        for edit in self._edits.get(name, ()):
            tensor = edit.apply(tensor)
        tensor = tensor.to(torch_dtypes()[self.tensors[name].dtype])
        if not is_finite(tensor):
            kind = f" as {tensor.dtype}".replace("torch.", "") if self._dtype else ""
            raise KeyreduceError(
                f"tensor {name!r} of {self._source.path} holds NaN or inf after its edits{kind}: it may be damaged"
            )
        return tensor

    def _changes(self, name: str) -> bool:
        return bool(self._edits.get(name)) or self.tensors[name] != self._source.tensors[name]

    def _describe(self, spec: TensorSpec) -> TensorSpec:
        shape = spec.shape
        for edit in self._edits.get(spec.name, ()):
            shape = edit.shape(shape)
        if self._dtype is not None and spec.dtype in PLAIN and spec.name not in self._scales:
            return make_spec(spec.name, self._dtype, shape)
        return spec._replace(shape=tuple(shape))


def rewrite(
    source: Checkpoint,
    target: Path,
    *,
    config: dict | None = None,
    edits: Mapping[str, Sequence[Edit]] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """Write ``source`` as a Hugging Face checkpoint with ``edits`` made and ``config`` as its config.json.

    Tensors that do not change are copied as bytes; the others are read, changed and written one at a time, so that
    memory stays at about one tensor.

    Args:
        source: the checkpoint to read.
        target: an existing, empty folder.
        config: the config of the new checkpoint, whose dtype becomes ``dtype``; by default the source's.
        edits, dtype: see :class:`EditedTensors`.
        max_shard_size: the most bytes in a shard of several tensors; None keeps the shards of the source, their names
            and the order of their tensors, and makes shards of 5 GB where it has none.
        progress: called after each tensor with the number of bytes written since the last call.

    Returns:
        File name -> its xxh3_128 in hex, of every shard.

    Raises KeyreduceError if an edited tensor is missing, quantized, or holds NaN or inf, a file cannot be written, or
    somebody wrote into the source meanwhile.
    """
    edited = EditedTensors(source, edits or {}, dtype)
    if max_shard_size is None and source.shards is not None:
        shards = {
            file: plan._replace(tensors=[edited.tensors[spec.name] for spec in plan.tensors])
            for file, plan in source.shards.items()
        }
    else:
        shards = split_into_shards(edited.tensors, max_shard_size or MAX_SHARD_SIZE)
    config = source.config if config is None else config
    write_folder_files(target, config_with_dtype(config, dtype), source.sidecars)
    checksums = write_weights(target, shards, edited.fetch, progress=progress)
    source.refuse_changed()
    return checksums


def config_with_dtype(config: dict, dtype: torch.dtype | None) -> dict:
    """Return ``config`` for a model of another dtype, which transformers loads it in; None leaves it."""
    if dtype is None:
        return config
    # transformers wrote torch_dtype before it wrote dtype, and reads either.
    field = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return config | {field: str(dtype).removeprefix("torch.")}


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor of floating-point numbers holds neither NaN nor inf."""
    # aminmax passes NaN and inf on and, unlike isfinite, makes no tensor as large as its argument.
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))

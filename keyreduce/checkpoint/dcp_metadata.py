"""The ``.metadata`` of a torch distributed checkpoint (DCP), read without trusting it.

The file is a pickle, and a pickle runs what its author chose. Here it is read through an unpickler that admits only
the plain-data classes that DCP's writer puts there, and what comes out is checked against the files beside it.
"""

import enum
import io
import math
import pathlib
import pickle
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

from keyreduce.checkpoint.headers import check_pickle_sizes
from keyreduce.checkpoint.source import METADATA_NAME
from keyreduce.errors import KeyreduceError

_DCP = "torch.distributed.checkpoint"
_ADMITTED = {
    (f"{_DCP}.metadata", "BytesStorageMetadata"),
    (f"{_DCP}.metadata", "ChunkStorageMetadata"),
    (f"{_DCP}.metadata", "Metadata"),
    (f"{_DCP}.metadata", "MetadataIndex"),
    (f"{_DCP}.metadata", "StorageMeta"),
    (f"{_DCP}.metadata", "TensorProperties"),
    (f"{_DCP}.metadata", "TensorStorageMetadata"),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class SavedTensor(NamedTuple):
    """A tensor of a distributed checkpoint: its key there, its dtype, its full shape, and the pieces that it is in."""

    key: str
    dtype: torch.dtype
    shape: torch.Size
    chunks: list[ChunkStorageMetadata]


class RestrictedReader(FileSystemReader):
    """DCP's reader of a folder, with the metadata read once, and only through the restricted unpickler."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.metadata = _read_metadata(folder / METADATA_NAME)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


def find_model_tensors(
    folder: Path, metadata: Metadata, layout: str | None = None
) -> tuple[str, dict[str, SavedTensor]]:
    """Return the layout, and the model's tensors by their name in the model.

    The metadata gives, for each key, the path in the state dict that was saved: ``("model", "a.weight")`` where the
    model was saved under a key of its own (nested), ``("a.weight",)`` where its tensors lie flat. Optimizer and
    training state are under keys of their own, and are left out.

    ``layout`` is ``nested`` or ``flat``; by default nested if any tensor is.

    Raises KeyreduceError if there are none, or the files that should hold them are missing or too short.
    """
    try:
        paths = {
            key: (metadata.planner_data or {}).get(key, (key,))
            for key, saved in metadata.state_dict_metadata.items()
            if isinstance(saved, TensorStorageMetadata)
        }
        keys = {
            "nested": {
                ".".join(map(str, path[1:])): key for key, path in paths.items() if path[0] == "model" and len(path) > 1
            },
            "flat": {str(path[0]): key for key, path in paths.items() if len(path) == 1},
        }
        layout = layout or ("nested" if keys["nested"] else "flat")
        tensors = {name: _check_tensor(folder, metadata, key) for name, key in keys[layout].items()}
        # A pickle can hold names that are not Unicode; safetensors cannot.
        "".join(tensors).encode()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # The unpickler lets through the right classes with any content.
        raise KeyreduceError(f"{folder / METADATA_NAME} is damaged: it does not describe its tensors") from error
    if not tensors and any(keys.values()):
        other = "nested" if layout == "flat" else "flat"
        raise KeyreduceError(f"{folder} holds no {layout} model, but a {other} one; leave `layout` out")
    if not tensors:
        raise KeyreduceError(f"{folder} holds no model: no tensors at its top level, and none under 'model'")
    return layout, tensors


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            # The folder it was saved to. A pure path of either kind can be made on any system.
            return getattr(pathlib, f"Pure{name}")
        if (module, name) == ("builtins", "getattr"):
            return _get_member  # the first releases of Python 3.11 pickle an enum's member as getattr(class, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no metadata of DCP needs")


def _get_member(owner: Any, name: str) -> Any:
    if not isinstance(owner, enum.EnumMeta):
        raise pickle.UnpicklingError("it asks for an attribute, which no metadata of DCP needs")
    return owner[name]


def _read_metadata(path: Path) -> Metadata:
    try:
        content = path.read_bytes()
        check_pickle_sizes(content)
        metadata = _RestrictedUnpickler(io.BytesIO(content)).load()
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # damaged bytes can make an unpickler raise nearly anything
        reason = " ".join(str(error).split())
        raise KeyreduceError(f"{path} is damaged, or not what DCP writes: {reason}") from error
    if not isinstance(metadata, Metadata):
        raise KeyreduceError(f"{path} is damaged, or not what DCP writes: it holds no checkpoint metadata")
    return metadata


def _check_tensor(folder: Path, metadata: Metadata, key: str) -> SavedTensor:
    """Describe one tensor, having made sure that its pieces are there and make up the whole."""
    saved = cast("TensorStorageMetadata", metadata.state_dict_metadata[key])
    dtype, shape = saved.properties.dtype, saved.size
    if not isinstance(dtype, torch.dtype) or not isinstance(shape, torch.Size) or min(shape, default=0) < 0:
        raise TypeError(f"{key!r} is no tensor")
    covered = 0
    for chunk in saved.chunks:
        info = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        file = folder / info.relative_path
        if file.parent != folder:
            raise KeyreduceError(f"{folder / METADATA_NAME} puts {key!r} outside its folder, in {info.relative_path!r}")
        if not file.is_file():
            raise KeyreduceError(f"{folder} has no {info.relative_path}, which holds {key!r}; copy the whole folder")
        count = math.prod(chunk.sizes)
        # A transform, such as compression, can make a piece smaller than its numbers.
        needed = info.length if info.transform_descriptors else max(info.length, count * dtype.itemsize)
        if info.offset < 0 or info.offset + needed > file.stat().st_size:
            raise KeyreduceError(f"{file} is too short to hold {key!r}: it may be truncated, get it again")
        covered += count
    # Where pieces are missing, DCP would leave memory as it was allocated.
    if covered != math.prod(shape):
        raise KeyreduceError(f"{folder} holds {covered} of the {math.prod(shape)} numbers of {key!r}")
    return SavedTensor(key, dtype, shape, saved.chunks)

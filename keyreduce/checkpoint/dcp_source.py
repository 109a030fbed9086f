"""A torch distributed checkpoint (DCP) that is read from, without putting it together in memory."""

import collections
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.utils import _create_file_view

from keyreduce.checkpoint.dcp import in_one_process
from keyreduce.checkpoint.dcp_metadata import RestrictedReader, SavedTensor, find_model_tensors
from keyreduce.checkpoint.folder import CONFIG_NAME, find_sidecars, refuse_wrapped
from keyreduce.checkpoint.shards import ByteRange, make_spec
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.checkpoint.tied import refuse_untied, tied_output
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json


class DcpCheckpoint(Checkpoint):
    """The model of an open DCP folder; see :class:`Checkpoint`. Optimizer and training state are not looked at.

    An output layer that is the embeddings is left out, as in a Hugging Face folder.

    Attributes:
        layout: ``nested`` where the model was saved under the key ``model``, ``flat`` where its tensors have their own
            names.
        left_out: how many entries of the DCP belong to something else than the model.

    Args:
        path: the folder, the one that holds ``.metadata``.
        config: a config.json, or a folder that holds one and the tokenizer; by default ``path`` itself.
        layout: which one to take where a DCP holds both; by default nested.

    Raises KeyreduceError if there is no config, the DCP is damaged, incomplete or holds no model of that layout, or its
    output layer is not the embeddings though the config says so.
    """

    shards = None

    def __init__(self, path: Path, *, config: Path | None = None, layout: str | None = None):
        self.path = path
        if config is None and not (path / CONFIG_NAME).is_file():
            raise KeyreduceError(f"{path} has no {CONFIG_NAME}; pass the one of the model with `config`")
        home = path if config is None else config
        self.config = read_json(home / CONFIG_NAME if home.is_dir() else home)
        self._home = home if home.is_dir() else path
        self._reader = RestrictedReader(path)
        self.layout, self._saved = find_model_tensors(path, self._reader.metadata, layout)
        self.left_out = len(self._reader.metadata.state_dict_metadata) - len(self._saved)
        self.tensors = {name: make_spec(name, saved.dtype, saved.shape) for name, saved in self._saved.items()}
        infos = (info for saved in self._saved.values() for _, info in self._pieces(saved))
        super().__init__(sorted({path / info.relative_path for info in infos}))
        self._ranges: dict[str, tuple[ByteRange, ...] | None] = {}
        refuse_untied(self, "if they are two, give a config.json that says false there, with `config`")
        for second in tied_output(self.config, self.tensors):
            self.tensors.pop(second, None)
            self._saved.pop(second, None)
        refuse_wrapped(self.path, self.tensors)

    @property
    def sidecars(self) -> tuple[Path, ...]:
        return find_sidecars(self._home)

    def read(self, name: str) -> torch.Tensor:
        saved, ranges = self._find(name), self.ranges(name)
        if ranges is not None and len(ranges) == 1 and saved.shape.numel():
            # Mapped: DCP would read it into memory, twice.
            (path, begin, end), mode = ranges[0], "c"  # a private copy of what is written to, should it be
            raw = np.memmap(path, np.uint8, mode, begin, (end - begin,))
            return torch.from_numpy(raw).view(saved.dtype).reshape(saved.shape)
        # DCP casts to the dtype of what it loads into, without a word: so that is the dtype that was saved.
        tensor = torch.empty(saved.shape, dtype=saved.dtype)
        # Keys are given as they were saved; flattening would only make each load walk over all of them.
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        with in_one_process(f"cannot read {saved.key!r} of {self.path}, which may be damaged, or hold safetensors"):
            load({saved.key: tensor}, storage_reader=self._reader, planner=planner, no_dist=True)
        return tensor

    def ranges(self, name: str) -> tuple[ByteRange, ...] | None:
        if name not in self._ranges:
            self._ranges[name] = self._find_ranges(self._find(name))
        return self._ranges[name]

    def refuse_other_dtype(self) -> None:
        """Make sure that most numbers have the dtype that the config names, into which a loader would cast them.

        Raises KeyreduceError if they have another one. Some tensors of a wider dtype are usual, and pass.
        """
        declared = self.config.get("dtype", self.config.get("torch_dtype"))
        dtypes = {name: str(saved.dtype).removeprefix("torch.") for name, saved in self._saved.items()}
        numbers = collections.Counter()
        for name, dtype in dtypes.items():
            numbers[dtype] += self._saved[name].shape.numel()
        usual, _ = numbers.most_common(1)[0]
        if declared is not None and declared != usual:
            names = [name for name, dtype in dtypes.items() if dtype != declared]
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            raise KeyreduceError(
                f"{self.path} holds {usual} where its config says {declared}: {', '.join(names[:10])}{more}; "
                f"choose with `dtype` {usual} or `dtype` {declared}"
            )

    def _find(self, name: str) -> SavedTensor:
        if name not in self._saved:
            raise KeyreduceError(f"{self.path} has no tensor {name!r}; its {CONFIG_NAME} is that of another model")
        return self._saved[name]

    def _pieces(self, saved: SavedTensor) -> list[tuple[ChunkStorageMetadata, _StorageInfo]]:
        """The pieces of a tensor, each with where it is in the files."""
        places = self._reader.metadata.storage_data
        return [(chunk, places[MetadataIndex(saved.key, chunk.offsets)]) for chunk in saved.chunks]

    def _find_ranges(self, saved: SavedTensor) -> tuple[ByteRange, ...] | None:
        """The pieces of a tensor one after another, where each holds whole rows: what FSDP writes."""
        found, row = [], 0
        for chunk, info in sorted(self._pieces(saved), key=lambda piece: tuple(piece[0].offsets)):
            begins_here = tuple(chunk.offsets[:1]) in ((), (row,)) and not any(chunk.offsets[1:])
            if not begins_here or chunk.sizes[1:] != saved.shape[1:]:
                return None
            row += chunk.sizes[0] if chunk.sizes else 1
            piece = self._find_piece(info, saved, chunk.sizes)
            if piece is None:
                return None
            found.append(piece)
        return tuple(found)

    def _find_piece(self, info: _StorageInfo, saved: SavedTensor, shape: torch.Size) -> ByteRange | None:
        """The bytes of one piece inside what ``torch.save`` made of it, if they are its numbers in order."""
        if info.transform_descriptors:
            return None
        path = self.path / info.relative_path
        try:
            with open(path, "rb") as file:
                # Loading onto the meta device reads no numbers, and tells where they are.
                view = cast("IO[bytes]", _create_file_view(file, info.offset, info.length))
                tensor = torch.load(view, map_location="meta", weights_only=True)
                storage = tensor.untyped_storage()
                begin = info.offset + storage._checkpoint_offset
        except OSError as error:
            raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
        except Exception:
            # Not torch.save's format, or damaged: reading it the ordinary way works, or says what is wrong.
            return None
        end = begin + shape.numel() * saved.dtype.itemsize
        is_plain = tensor.is_contiguous() and not tensor.is_neg() and not tensor.is_conj()
        fits = tensor.storage_offset() == 0 and info.offset <= begin <= end <= info.offset + info.length
        if tensor.dtype != saved.dtype or tensor.shape != shape or not is_plain or not fits:
            return None
        return ByteRange(path, begin, end)

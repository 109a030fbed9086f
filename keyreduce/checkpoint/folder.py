"""A Hugging Face checkpoint folder: config.json, safetensors shards, and the small files beside them."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from keyreduce.checkpoint.shards import ByteRange, Header, ShardPlan, TensorEntry, TensorSpec, read_header
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json
from keyreduce.workspace import PROJECTIONS_NAME, RECORD_NAME

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# What a loader may look for beside config.json and the weights. Code is carried with them, never run.
_SIDECARS = ("*.jinja", "*.model", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*", "merges.txt", "tokenizer*", "vocab*")
_SIDECARS += ("added_tokens.json", "chat_template.json", "generation_config.json", "special_tokens_map.json")
_SIDECARS += ("*processor_config.json", PROJECTIONS_NAME)


class HfCheckpoint(Checkpoint):
    """An open Hugging Face folder; see :class:`Checkpoint`. ``headers`` is shard file name -> its header, in order."""

    def __init__(self, path: Path, config: dict, headers: dict[str, Header]):
        super().__init__(path / file for file in headers)
        self.path = path
        self.config = config
        self._entries = {name: (file, entry) for file, h in headers.items() for name, entry in h.entries.items()}
        self.shards = {
            file: ShardPlan([TensorSpec(name, e.dtype, e.shape) for name, e in h.entries.items()], h.metadata)
            for file, h in headers.items()
        }
        self.tensors = {spec.name: spec for plan in self.shards.values() for spec in plan.tensors}

    @property
    def sidecars(self) -> tuple[Path, ...]:
        return find_sidecars(self.path)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from its file. The mapping goes with the tensor, so read one at a time."""
        file, _ = self._entry(name)
        try:
            with safe_open(str(self.path / file), framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise KeyreduceError(f"{self.path / file} cannot be read: {error}") from error

    def ranges(self, name: str) -> tuple[ByteRange, ...]:
        file, entry = self._entry(name)
        return (ByteRange(self.path / file, entry.begin, entry.end),)

    def _entry(self, name: str) -> tuple[str, TensorEntry]:
        if name not in self._entries:
            raise KeyreduceError(f"{self.path} has no tensor {name!r}; its {CONFIG_NAME} is that of another model")
        return self._entries[name]


def open_folder(path: Path) -> HfCheckpoint:
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
        loose = "; consolidate the pieces that each process saved" if any(path.glob("shard-*.safetensors")) else ""
        raise KeyreduceError(f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}{convert}{loose}")
    headers = {file: read_header(path / file) for file in files}
    if not any(header.entries for header in headers.values()):
        raise KeyreduceError(f"{path} holds no tensors")
    if weight_map is not None:
        _check_index(path, weight_map, headers)
    return HfCheckpoint(path, config, headers)


def find_sidecars(folder: Path) -> tuple[Path, ...]:
    """Return the files of ``folder`` that belong to its model beside config.json and the weights, by name."""
    # The model card of another model would say what is not so; one beside our record is ours.
    card = ["README.md"] if (folder / RECORD_NAME).is_file() else []
    return tuple(sorted({path for pattern in [*_SIDECARS, *card] for path in folder.glob(pattern) if path.is_file()}))


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

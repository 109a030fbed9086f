"""A Hugging Face checkpoint folder: config.json, safetensors shards, and the small files beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from keyreduce.checkpoint.shards import ByteRange, ShardPlan, read_header
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.checkpoint.tied import tied_output
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import dangling_link, read_json
from keyreduce.workspace import PROJECTIONS_NAME, RECORD_NAME

if TYPE_CHECKING:
    import torch  # headers are read without it

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# What a loader may look for beside config.json and the weights. Code is carried with them, never run.
_SIDECARS = ("*.jinja", "*.model", "*.py", "*.tiktoken", "LICENSE*", "NOTICE*", "merges.txt", "tokenizer*", "vocab*")
_SIDECARS += ("added_tokens.json", "chat_template.json", "generation_config.json", "special_tokens_map.json")
_SIDECARS += ("*processor_config.json", PROJECTIONS_NAME)
# The heads of decision models (jev), which transformers reads from beside the weights of the model that they are on.
_SIDECARS += ("head.safetensors", "readout.safetensors", "decision_config.json", "judge_config.json")
_SIDECARS += ("calibration.json",)

# What peft writes, and what transformers looks for beside any weights.
_ADAPTER_NAMES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What wrappers of a model put into the names of its tensors -> whose it is.
_WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning",
    "base_model.model.": "peft",
    "module.": "DistributedDataParallel or DeepSpeed",
}


class HfCheckpoint(Checkpoint):
    """An open Hugging Face folder; see :class:`Checkpoint`. ``shards`` is file name -> what it holds, in order."""

    shards: Mapping[str, ShardPlan]

    def __init__(self, path: Path, config: dict, shards: Mapping[str, ShardPlan], ranges: Mapping[str, ByteRange]):
        super().__init__(path / file for file in shards)
        self.path, self.config, self.shards, self._ranges = path, config, shards, ranges
        self.tensors = {spec.name: spec for plan in self.shards.values() for spec in plan.tensors}

    @property
    def sidecars(self) -> tuple[Path, ...]:
        return find_sidecars(self.path)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from its file. The mapping goes with the tensor, so read one at a time."""
        from safetensors import SafetensorError, safe_open

        ((file, _, _),) = self.ranges(name)
        try:
            with safe_open(str(file), framework="pt") as opened:
                return opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise KeyreduceError(f"{file} cannot be read: {error}") from error

    def ranges(self, name: str) -> tuple[ByteRange, ...]:
        if name not in self._ranges:
            raise KeyreduceError(f"{self.path} has no tensor {name!r}; its {CONFIG_NAME} is that of another model")
        return (self._ranges[name],)


def open_folder(path: Path) -> HfCheckpoint:
    """Open a Hugging Face folder and check config, index and headers against each other.

    Raises KeyreduceError if there is no such folder, it holds no safetensors checkpoint, or the checkpoint is damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise KeyreduceError(f"there is no folder {path}")
    _refuse_adapter(path)
    if not (path / CONFIG_NAME).is_file():
        found = dangling_link(path / CONFIG_NAME)
        raise KeyreduceError(found or f"{path} has no {CONFIG_NAME}: it is not a Hugging Face checkpoint")
    config = read_json(path / CONFIG_NAME)
    # Where a folder has both, transformers too takes the single file.
    if (path / SINGLE_NAME).is_file():
        weight_map, files = None, [SINGLE_NAME]
    elif (path / INDEX_NAME).is_file():
        weight_map = _read_weight_map(path)
        files = sorted(set(weight_map.values()))
        for file in files:
            if not (path / file).is_file():
                found = dangling_link(path / file) or f"{path} has no {file}, which {INDEX_NAME} names"
                raise KeyreduceError(f"{found}; get the rest of the checkpoint")
    elif found := dangling_link(path / SINGLE_NAME) or dangling_link(path / INDEX_NAME):
        raise KeyreduceError(f"{found}; get the rest of the checkpoint")
    else:
        convert = "; convert its .bin weights to safetensors first" if any(path.glob("*.bin")) else ""
        loose = "; consolidate the pieces that each process saved" if any(path.glob("shard-*.safetensors")) else ""
        raise KeyreduceError(f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}{convert}{loose}")
    headers = {file: read_header(path / file) for file in files}
    places = {(file, name) for file, (_, ranges) in headers.items() for name in ranges}
    if not places:
        raise KeyreduceError(f"{path} holds no tensors")
    names = {name for _, name in places}
    tied = tied_output(config, names)
    # Of a tied tensor the index may name what no file holds: transformers does not look for it there.
    named = {(file, name) for name, file in (weight_map or {}).items() if name in names or name not in tied}
    if weight_map is not None and (differing := places ^ named):
        file, name = min(differing)
        raise KeyreduceError(f"{path / INDEX_NAME} and {file} disagree about tensor {name!r}; get both again")
    refuse_wrapped(path, names)
    find_sidecars(path)  # so that what is missing of them is told before the work
    shards = {file: plan for file, (plan, _) in headers.items()}
    return HfCheckpoint(
        path, config, shards, {name: one for _, ranges in headers.values() for name, one in ranges.items()}
    )


def refuse_wrapped(path: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint whose tensors are named as those of a wrapper around the model; ``path`` is what to call it.

    Raises KeyreduceError, which names the prefix.
    """
    for name in names:
        for prefix, whose in _WRAPPERS.items():
            if name.startswith(prefix) or (prefix.startswith("_") and f".{prefix}" in name):
                raise KeyreduceError(
                    f"tensors of {path} have the prefix {prefix!r} of {whose} in their names, such as {name!r}; "
                    "rename them, or save the model that is inside the wrapper"
                )


def _refuse_adapter(path: Path) -> None:
    """Refuse what transformers would add to the weights when it loads them, and no stream of tensors does."""
    for name in _ADAPTER_NAMES:
        if (path / name).is_file():
            if (path / SINGLE_NAME).is_file() or (path / INDEX_NAME).is_file():
                told = f"holds an adapter ({name}) beside its weights: merge it first, or move the adapter elsewhere"
            else:
                told = f"is an adapter ({name}), not a model: merge it into its model first"
            raise KeyreduceError(f"{path} {told} (peft's merge_and_unload)")


def find_sidecars(folder: Path) -> tuple[Path, ...]:
    """Return the files of ``folder`` that belong to its model beside config.json and the weights, by name.

    Raises KeyreduceError if one is a link that leads nowhere.
    """
    # The model card of another model would say what is not so; one beside our record is ours.
    card = ["README.md"] if (folder / RECORD_NAME).is_file() else []
    found = sorted({path for pattern in [*_SIDECARS, *card] for path in folder.glob(pattern)})
    if message := next(filter(None, map(dangling_link, found)), None):
        raise KeyreduceError(f"{message}; get the rest of the checkpoint")
    return tuple(path for path in found if path.is_file())


def _read_weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise KeyreduceError(f"{path / INDEX_NAME} has no weight_map")
    for name, file in weight_map.items():
        # A path that leads elsewhere could make us read, and name our output after, any file of the machine.
        if not isinstance(file, str) or Path(file).name != file or file == "..":
            raise KeyreduceError(f"{path / INDEX_NAME} puts tensor {name!r} into {file!r}, not a file of its folder")
    return weight_map

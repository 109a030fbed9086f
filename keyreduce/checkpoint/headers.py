"""What describes a checkpoint, read without its numbers and without torch: in milliseconds, whatever its size."""

import io
import json
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from keyreduce.checkpoint.find import find_dcp, find_local
from keyreduce.checkpoint.folder import CONFIG_NAME, open_folder
from keyreduce.checkpoint.shards import SAFETENSORS_NAMES, TensorSpec
from keyreduce.checkpoint.source import METADATA_NAME
from keyreduce.errors import KeyreduceError, reason
from keyreduce.outputs import read_json


class Headers(NamedTuple):
    """A checkpoint's config.json, and tensor name -> name, dtype and shape; ``folder`` is None where it is remote."""

    folder: Path | None
    config: dict
    tensors: Mapping[str, TensorSpec]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: spec.shape for name, spec in self.tensors.items()}


def read_headers(name: str | None, *, config: Path | None = None) -> Headers:
    """Return what describes a model: a Hugging Face folder, a DCP, a shipped model or one on the hub.

    Of a model on the hub that was not downloaded before, config.json and the headers are fetched, and no numbers.

    Args:
        name: what :func:`keyreduce.checkpoint.find.find_model` takes.
        config: for a DCP without one: its config.json, or a folder that holds it.

    Raises KeyreduceError if there is no such model, or it is damaged.
    """
    folder = find_local(name)
    if folder is None:
        assert name is not None  # the default model is a local one
        return _on_hub(name)
    dcp = find_dcp(folder)
    if dcp is None:
        found = open_folder(folder)
        return Headers(folder, found.config, found.tensors)
    home = dcp if config is None else config
    if config is None and not (dcp / CONFIG_NAME).is_file():
        raise KeyreduceError(f"{dcp} has no {CONFIG_NAME}; pass the one of the model with `config`")
    content = read_json(home / CONFIG_NAME if home.is_dir() else home)
    return Headers(dcp, content, _of_dcp(dcp, content))


def _on_hub(name: str) -> Headers:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, CONFIG_NAME)
    if isinstance(cached, str):
        try:
            found = open_folder(Path(cached).parent)
            return Headers(found.path, found.config, found.tensors)
        except KeyreduceError:
            pass  # only parts of the model were downloaded
    try:
        config = json.loads(Path(hf_hub_download(name, CONFIG_NAME)).read_text(encoding="utf-8"))
        files = get_safetensors_metadata(name).files_metadata.values()
    except Exception as error:  # its client lets through what its HTTP library raises, whichever that is
        raise KeyreduceError(
            f"there is no folder {name}, and the hub did not give a model of that name: {reason(error)}"
        ) from error
    specs = [TensorSpec(key, one.dtype, tuple(one.shape)) for file in files for key, one in file.tensors.items()]
    return Headers(None, config, {spec.name: spec for spec in specs})


def check_pickle_sizes(content: bytes) -> None:
    """Refuse a pickle that announces more than it holds: the unpickler would allocate that much.

    pickletools itself refuses strings longer than what is left; what remains is the place in the memo, a table that
    has room for every place before it. Raises pickle.UnpicklingError.
    """
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > len(content):
            raise pickle.UnpicklingError("it asks for more memory than its size can need")


class _Plain:
    """Stands in for a class of torch: it keeps what the pickle says of an object, and does nothing."""

    state: Any = None

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dtype(str):
    """Stands in for a dtype of torch: its name."""


class _Unpickler(pickle.Unpickler):
    """Reads the metadata of a DCP into stand-ins: no class of any library is made, and nothing of one is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and name in SAFETENSORS_NAMES:
            return _Dtype(name)
        # DCP's own classes, and what is of no interest here: layouts, an enum's member, the folder it was saved to.
        return type(name, (_Plain,), {"__module__": module})


def _of_dcp(folder: Path, config: Mapping) -> dict[str, TensorSpec]:
    """The model's tensors, by the names that they have in a Hugging Face folder; see dcp_metadata.py for the layout."""
    path = folder / METADATA_NAME
    try:
        content = path.read_bytes()
        check_pickle_sizes(content)
        state = _Unpickler(io.BytesIO(content)).load().state
        paths = state["planner_data"] or {}
        nested, flat = {}, {}
        for key, saved in state["state_dict_metadata"].items():
            if type(saved).__name__ != "TensorStorageMetadata":
                continue
            place = paths.get(key, (key,))
            dtype, shape = _layout(saved.state)
            if place[0] == "model" and len(place) > 1:
                name = ".".join(map(str, place[1:]))
                nested[name] = TensorSpec(name, dtype, shape)
            elif len(place) == 1:
                flat[str(place[0])] = TensorSpec(str(place[0]), dtype, shape)
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # damaged bytes can make an unpickler raise nearly anything
        raise KeyreduceError(f"{path} is damaged: it does not describe its tensors") from error
    found = nested or flat
    if not found:
        raise KeyreduceError(f"{folder} holds no model: no tensors at its top level, and none under 'model'")
    text = config.get("text_config")
    inner = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    if config.get("tie_word_embeddings", inner) is True:
        found.pop("lm_head.weight", None)  # it is the embeddings, and a Hugging Face folder leaves it out
    return found


def _layout(state: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    properties = state["properties"].state
    dtype = next(one for one in properties if isinstance(one, _Dtype))
    shape = tuple(int(size) for size in state["size"])
    if dtype == "float4_e2m1fn_x2":
        shape = (*shape[:-1], 2 * shape[-1])
    return SAFETENSORS_NAMES[dtype], shape

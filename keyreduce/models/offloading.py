"""Models larger than a device's memory: their layers wait elsewhere, and come to the device in their turn.

The moving is accelerate's. Files are mapped: layers that wait on the disk take no memory of the machine either.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.families.mixer_tensors import expected_tensors
from keyreduce.models.classes import family_in
from keyreduce.models.meta import build_model

PLACES = ("disk", "cpu", "auto")


@contextlib.contextmanager
def offloading(config: Mapping, device: torch.device, place: str | None) -> Iterator[dict]:
    """While the block runs, yield the arguments with which ``from_pretrained`` leaves layers elsewhere.

    Args:
        config: the content of config.json.
        device: where the layers run, and where everything that is no layer stays.
        place: where layers wait: ``disk``, ``cpu``, or with ``auto`` wherever there is room, the devices first; None
            leaves all on the device.

    Raises KeyreduceError if there is no such place, accelerate is not installed, or the model's class does not allow
    it.
    """
    if place is None:
        yield {}
        return
    if place not in PLACES:
        raise KeyreduceError(f"`offload` is {place!r}; take one of {', '.join(PLACES)}")
    try:
        import accelerate  # noqa: F401
    except ImportError:
        raise KeyreduceError("`offload` needs accelerate: pip install accelerate") from None
    family = family_of(config)
    if family.shipped_by != "transformers":
        raise KeyreduceError(
            f"`offload` is for models of transformers; those of {family.shipped_by}, such as {family.model_type}, read "
            "weights without calling the modules that hold them, and would not find them"
        )
    if place == "cpu" and device.type == "cpu":
        raise KeyreduceError("`offload` cpu is for a GPU; on a CPU, layers can wait on the disk: `offload` disk")
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as folder:
        placement = "auto" if place == "auto" else _placement(config, device, place)
        yield {"device_map": placement, "offload_folder": folder}


def device_of(module: torch.nn.Module) -> torch.device:
    """Return the device on which a module runs, wherever its weights wait."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    return next(module.parameters()).device


def read_parameter(model: PreTrainedModel, name: str, folder: Path | None) -> torch.Tensor:
    """Return a parameter of a mixer by its name in the model, from the checkpoint where it waits on the disk.

    ``folder`` is that checkpoint; None for a model that is there as a whole.
    """
    parameter = model.get_parameter(name)
    if folder is None or not parameter.is_meta:
        return parameter
    source, family = open_folder(folder), family_in(model)
    pieces = []
    for file, part in expected_tensors(source.config, source.tensors).items():
        inner = [family.tensor_name(part.layer, one) for one in part.inner]
        if name in inner:
            tensor = source.read(file)
            pieces.append(tensor.split(part.rows)[inner.index(name)] if len(inner) > 1 else tensor)
    return torch.cat(pieces)


def _placement(config: Mapping, device: torch.device, place: str) -> dict[str, str]:
    """Where each part of the model is: its layers at ``place``, what is before and after them on the device."""
    model = build_model(config)
    layers = family_in(model).mixer.split(".{layer}")[0]
    parts = [name for name, module in model.named_modules() if name and f"{layers}.".startswith(f"{name}.")]
    found = {}
    for parent in ("", *parts[:-1]):
        for name, _ in model.get_submodule(parent).named_children():
            full = f"{parent}.{name}".removeprefix(".")
            if full not in parts:
                found[full] = str(device)
    return found | {f"{layers}.{name}": place for name, _ in model.get_submodule(layers).named_children()}

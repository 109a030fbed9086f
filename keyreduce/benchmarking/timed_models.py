"""The models of a benchmark: from checkpoints, or random ones of several sizes made from one config."""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from keyreduce.devices import available_memory
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, family_of
from keyreduce.families.table import MixerSizes
from keyreduce.models.classes import family_in
from keyreduce.models.loading import LoadedModel, prepare_backend
from keyreduce.models.meta import build_mixer, build_model

_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|invalid storage size|storage size calculation over"
)
_TOO_LARGE = "{} needs more memory than there is; take a smaller batch size or sequence length"


@dataclass(frozen=True)
class TimedModel:
    """A model to be timed, and its first delta-rule layer.

    Attributes:
        model: the model, in evaluation mode. Where one mixer alone is timed, all else may be on the meta device.
        layer: the number of the first delta-rule layer. Other layers may have other sizes.
        config: the content of the model's config.json.
        folder: the folder of the checkpoint; None if the weights are random.
    """

    label: str
    model: PreTrainedModel
    family: Family
    layer: int
    config: dict
    folder: Path | None

    @property
    def mixer(self) -> torch.nn.Module:
        """The first delta-rule layer."""
        return self.model.get_submodule(self.family.mixer.format(layer=self.layer))

    @property
    def device(self) -> torch.device:
        """The device of the mixer."""
        return next(self.mixer.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model; a mixer may keep some of its parameters in float32."""
        return self.model.dtype

    @property
    def hidden(self) -> int:
        return self.family.width(self.config)

    @property
    def vocabulary(self) -> int:
        return cast(torch.nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]

    @property
    def sizes(self) -> MixerSizes:
        """The sizes of the first delta-rule layer."""
        return self.family.sizes(self.config, self.layer)

    @property
    def head_sizes(self) -> dict[str, int]:
        """The channels of a head, as they stand in each entry of a report."""
        return {"head_k_dim": self.sizes.head_k_dim, "head_v_dim": self.sizes.head_v_dim}

    def describe(self) -> dict:
        """Return the sizes as JSON; ``state_bytes_per_sequence`` counts all layers, in float32."""
        return {
            "label": self.label,
            "folder": None if self.folder is None else str(self.folder),
            "model_type": self.config["model_type"],
            "hidden_size": self.hidden,
            "layers": len(self.family.layer_sizes(self.config)),
            "layer": self.layer,
            **self.sizes._asdict(),
            "state_bytes_per_sequence": self.family.state_bytes(self.config),
            "mixer_parameters": sum(parameter.numel() for parameter in self.mixer.parameters()),
            "layers_alike": len(set(self.family.layer_sizes(self.config).values())) == 1,
        }


def timed_models(models: Mapping[str, LoadedModel]) -> list[TimedModel]:
    """Return loaded models as models to be timed; the first is the one that the others are compared with.

    Raises:
        KeyreduceError: they differ in hidden size, device or dtype, or one has no delta-rule layer.
    """
    made: list[TimedModel] = []
    for label, loaded in models.items():
        config = loaded.model.config.to_dict()
        layer = _first_layer(loaded.family, config, str(loaded.folder))
        made.append(TimedModel(label, loaded.model, loaded.family, layer, config, loaded.folder))
        first, other = made[0], made[-1]
        for name, ours, theirs in (
            ("hidden size", first.hidden, other.hidden),
            ("device", first.device, other.device),
            ("dtype", first.dtype, other.dtype),
        ):
            if ours != theirs:
                raise KeyreduceError(
                    f"{first.label} and {label} differ in {name} ({ours} and {theirs}), so their mixers cannot be "
                    f"compared on the same input; give models of one {name}"
                )
    return made


def random_models(
    config: Mapping, sizes: Sequence[MixerSizes], device: torch.device, dtype: torch.dtype, *, whole: bool, seed: int
) -> list[TimedModel]:
    """Return models of a config.json with random weights, one for each of ``sizes``, which all its layers have.

    Their labels are ``KxV``. Where they are not to be ``whole``, only the first delta-rule mixer takes memory.

    Raises:
        KeyreduceError: the config cannot express such sizes, or no model can be made from it.
    """
    family = family_of(config)
    prepare_backend(device)
    layer = _first_layer(family, config, "the config")
    made = []
    for size in sizes:
        label = f"{size.head_k_dim}x{size.head_v_dim}"
        torch.manual_seed(seed)
        try:
            resized = family.resized(config, dict.fromkeys(family.mixer_layers(config), size))
            model = build_model(resized, device, dtype) if whole else build_mixer(resized, layer, device, dtype)
        except KeyreduceError as error:
            raise KeyreduceError(f"with heads of {label} channels: {error}") from error
        located = replace(family.in_model, mixer=family_in(model).mixer)
        made.append(TimedModel(label, model, located, layer, resized, None))
    return made


def sizes_named(config: Mapping, pairs: Sequence[tuple[int, int | None]]) -> list[MixerSizes]:
    """Return the sizes of a config's first delta-rule layer, but for the channels of a head.

    ``pairs`` are ``head_k_dim`` and ``head_v_dim``, where None stands for that of the config.

    Raises KeyreduceError if the config has no such layer, or is none that keyreduce knows.
    """
    family = family_of(config)
    sizes = family.sizes(config, _first_layer(family, config, "the config"))
    return [sizes._replace(head_k_dim=keys, head_v_dim=values or sizes.head_v_dim) for keys, values in pairs]


@contextlib.contextmanager
def explained_out_of_memory(what: str) -> Iterator[None]:
    """Raise an allocator's error within the block as a KeyreduceError, one line that says what was being done."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise KeyreduceError(_TOO_LARGE.format(what)) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that the CPU or GPU has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error).lower()) is not None


def check_memory(size: int, device: torch.device, what: str) -> None:
    """Raise a KeyreduceError where fewer than ``size`` bytes are free, before the work needs them.

    An operating system promises more memory than it has, and kills the process that uses it.
    """
    if size > available_memory(device):
        raise KeyreduceError(_TOO_LARGE.format(what))


def _first_layer(family: Family, config: Mapping, name: str) -> int:
    layers = family.mixer_layers(config)
    if not layers:
        raise KeyreduceError(f"{name} has no delta-rule layer to time; give a model that has one")
    return layers[0]

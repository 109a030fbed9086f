"""The models of a benchmark: from checkpoints, or random ones of several key sizes made from one config."""

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
from keyreduce.models.meta import build_model

_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|invalid storage size|storage size calculation over"
)
_TOO_LARGE = "{} needs more memory than there is; take a smaller batch size or sequence length"


@dataclass(frozen=True)
class TimedModel:
    """A model to be timed, and its first delta-rule layer.

    Attributes:
        model: the model, in evaluation mode. It may have fewer layers than ``config`` says, where one layer is timed.
        layer: the number of the first delta-rule layer. Other layers may have other sizes.
        config: the content of the whole model's config.json.
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
    def hidden(self) -> int:
        return self.family.width(self.config)

    @property
    def vocabulary(self) -> int:
        return cast(torch.nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]

    @property
    def sizes(self) -> MixerSizes:
        """The sizes of the first delta-rule layer."""
        return self.family.sizes(self.config, self.layer)

    def describe(self) -> dict:
        """Return the sizes as JSON; ``state_bytes_per_sequence`` counts all layers, in float32."""
        return {
            "label": self.label,
            "folder": None if self.folder is None else str(self.folder),
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
            ("device", first.model.device, other.model.device),
            ("dtype", first.model.dtype, other.model.dtype),
        ):
            if ours != theirs:
                raise KeyreduceError(
                    f"{first.label} and {label} differ in {name} ({ours} and {theirs}), so their mixers cannot be "
                    f"compared on the same input; give models of one {name}"
                )
    return made


def random_models(
    config: Mapping, key_sizes: Sequence[int], device: torch.device, dtype: torch.dtype, *, whole: bool, seed: int
) -> list[TimedModel]:
    """Return models of a config.json with random weights, one for each ``head_k_dim`` of ``key_sizes``.

    They have all layers if they are to be ``whole``, else only those up to the first delta-rule layer.

    Raises:
        KeyreduceError: the config cannot express such a size, or no model can be made from it.
    """
    family = family_of(config)
    prepare_backend(device)
    layer = _first_layer(family, config, "the config")
    made = []
    for keys in key_sizes:
        sizes = {number: size._replace(head_k_dim=keys) for number, size in family.layer_sizes(config).items()}
        resized = family.resized(config, sizes)
        built = resized if whole else _first_layers(family, resized, layer + 1)
        torch.manual_seed(seed)
        try:
            model = build_model(built, device, dtype)
        except KeyreduceError as error:
            raise KeyreduceError(f"with head_k_dim {keys}: {error}") from error
        located = replace(family.in_model, mixer=family_in(model).mixer)
        made.append(TimedModel(f"K={keys}", model, located, layer, resized, None))
    return made


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


def _first_layers(family: Family, config: Mapping, count: int) -> dict:
    """Return the config of a model of the first ``count`` layers; ratios that are listed by layer may stay longer."""
    cut = dict(config)
    language = family.copied_language(cut)
    for name, value in language.items():
        if name.endswith("_types") and isinstance(value, list):
            language[name] = value[:count]  # of mixers, of MLPs, of indexers: one for each layer
        if name.endswith("layer_ids") and isinstance(value, list):
            language[name] = [number for number in value if number <= count]  # from one
    family.num_layers.write(language, {0: count}, count)
    return cut


def _first_layer(family: Family, config: Mapping, name: str) -> int:
    layers = family.mixer_layers(config)
    if not layers:
        raise KeyreduceError(f"{name} has no delta-rule layer to time; give a model that has one")
    return layers[0]

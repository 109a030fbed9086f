"""What is timed: models from checkpoints, or random ones of several key sizes made from one config."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from keyreduce.devices import available_memory
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, family_of
from keyreduce.families.table import MixerSizes
from keyreduce.models.loading import LoadedModel, prepare_backend
from keyreduce.models.meta import build_model


@dataclass(frozen=True)
class Subject:
    """A model to be timed, and its first delta-rule layer.

    Attributes:
        label: its name in tables.
        model: in evaluation mode. It may hold fewer layers than ``config`` says, where one layer alone is timed.
        family: its tables.
        layer: the number of its first delta-rule layer; where layers differ in size it stands for none of the others.
        config: the content of the whole model's config.json.
        folder: where its checkpoint is; None if it is random.
    """

    label: str
    model: PreTrainedModel
    family: Family
    layer: int
    config: dict
    folder: Path | None

    @property
    def mixer(self) -> torch.nn.Module:
        """Its first delta-rule layer."""
        return self.model.get_submodule(self.family.mixer.format(layer=self.layer))

    @property
    def hidden(self) -> int:
        """Its hidden size."""
        return round(self.family.hidden.read(self.config))

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        return self.model.get_input_embeddings().weight.shape[0]

    @property
    def sizes(self) -> MixerSizes:
        """The sizes of that layer."""
        return self.family.sizes(self.config, self.layer)

    def describe(self) -> dict:
        """Return its sizes as JSON; the bytes of state are those of all layers, in float32.

        ``layers_alike`` says whether all its delta-rule layers have the sizes of the first.
        """
        return {
            "label": self.label,
            "folder": None if self.folder is None else str(self.folder),
            "layer": self.layer,
            **self.sizes._asdict(),
            "state_bytes_per_sequence": self.family.state_bytes(self.config),
            "mixer_parameters": sum(parameter.numel() for parameter in self.mixer.parameters()),
            "layers_alike": len(set(self.family.layer_sizes(self.config).values())) == 1,
        }


def subjects_of(models: Mapping[str, LoadedModel]) -> list[Subject]:
    """Return loaded models as subjects; the first is the one that the others are compared with.

    Raises:
        KeyreduceError: they differ in hidden size, device or dtype, or one has no delta-rule layer.
    """
    subjects = []
    for label, loaded in models.items():
        config = loaded.model.config.to_dict()
        layer = _first_layer(loaded.family, config, str(loaded.folder))
        subjects.append(Subject(label, loaded.model, loaded.family, layer, config, loaded.folder))
        _check_alike(subjects[0], subjects[-1])
    return subjects


def random_subjects(
    config: Mapping,
    key_sizes: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    *,
    whole: bool,
    seed: int,
) -> list[Subject]:
    """Make random models from a config, one of each ``head_k_dim``; nothing else of it changes.

    Args:
        config: the content of a config.json.
        key_sizes: of the models, in the order wanted.
        device, dtype: of their weights.
        whole: all layers; else only as many as it takes to have a delta-rule layer.
        seed: of their weights.

    Raises:
        KeyreduceError: the config cannot say such a size, or no model is made of it.
    """
    family = family_of(config)
    prepare_backend(device)
    layer = _first_layer(family, config, "the config")
    subjects = []
    for keys in key_sizes:
        sizes = {number: size._replace(head_k_dim=keys) for number, size in family.layer_sizes(config).items()}
        resized = family.resized(config, sizes)
        built = resized if whole else _first_layers(family, resized, layer + 1)
        torch.manual_seed(seed)
        try:
            model = build_model(built, device, dtype)
        except KeyreduceError as error:
            raise KeyreduceError(f"with head_k_dim {keys}: {error}") from error
        subjects.append(Subject(f"K={keys}", model, family, layer, resized, None))
    return subjects


@contextlib.contextmanager
def memory_errors_told(what: str) -> Iterator[None]:
    """Turn the allocators' errors into one line.

    Raises:
        KeyreduceError: the block needed more memory than there is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise KeyreduceError(
            f"{what} needs more memory than there is; take a smaller batch size or sequence length"
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that a CPU or a GPU has no memory left."""
    words = (
        "can't allocate memory",
        "not enough memory",
        "invalid storage size",
        "storage size calculation overflowed",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def refuse_beyond_memory(size: int, device: torch.device, what: str) -> None:
    """Refuse what a CPU would be killed for: systems promise more memory than they have.

    Raises:
        KeyreduceError: ``size`` bytes are more than is free.
    """
    if size > available_memory(device):
        raise KeyreduceError(f"{what} needs more memory than there is; take a smaller batch size or sequence length")


def _first_layers(family: Family, config: Mapping, count: int) -> dict:
    """Return the config of the first layers alone; lists of ratios may be longer than a model."""
    cut = dict(config)
    family.num_layers.write(cut, {0: count}, count)
    # A model that sees keeps its language model's config within its own; the line above has copied that.
    for part in (cut, cut.get("text_config") or {}):
        if isinstance(part.get("layer_types"), list):
            part["layer_types"] = part["layer_types"][:count]
    return cut


def _check_alike(first: Subject, other: Subject) -> None:
    properties = {
        "hidden size": lambda subject: subject.hidden,
        "device": lambda subject: subject.model.device,
        "dtype": lambda subject: subject.model.dtype,
    }
    for name, read in properties.items():
        ours, theirs = read(first), read(other)
        if ours != theirs:
            raise KeyreduceError(
                f"{first.label} and {other.label} differ in {name} ({ours} and {theirs}), so their mixers cannot be "
                f"compared on the same input; give models of one {name}"
            )


def _first_layer(family: Family, config: Mapping, name: str) -> int:
    layers = family.mixer_layers(config)
    if not layers:
        raise KeyreduceError(f"{name} has no delta-rule layer to time; give a model that has one")
    return layers[0]

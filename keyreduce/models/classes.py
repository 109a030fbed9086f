"""The class of transformers that a config asks for, and the table of the mixers in a model of it."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, family_of


def class_of(theirs: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class that loads a checkpoint with this config; None where transformers has none.

    It is the one that ``architectures`` names. Of a larger model that generates text the language model alone is taken
    where it has a class of its own, since text needs nothing of the rest. A config that names no class of transformers
    gets that of its type, for causal language models or else for images and text.
    """
    alone: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(theirs), None)
    named = next(filter(None, (_named(name, theirs) for name in theirs.architectures or ())), None)
    if named is not None and (alone is None or not named.can_generate()):
        return named
    seeing: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(theirs), None)
    return alone or seeing


def _named(name: str, theirs: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of transformers of this name, if it is one for models of this config."""
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    return found if is_model and found.config_class is type(theirs) else None


def config_for(model_class: type[PreTrainedModel], theirs: PretrainedConfig) -> PretrainedConfig:
    """Return the part of a config that a class of :func:`class_of` takes: all of it, or the language model's."""
    is_whole = isinstance(theirs, model_class.config_class or PretrainedConfig)
    return theirs if is_whole else theirs.get_text_config()


def from_pretrained(model_class: type[PreTrainedModel], folder: Path | None, **options: Any) -> tuple[Any, dict]:
    """Return the model that a class of :func:`class_of` loads, and transformers' report of its tensors.

    A class may put its own loading around that of transformers, and fail where such a report is asked for.

    Args:
        folder: where the tensors are; None with a ``config`` and a ``state_dict`` among the ``options``.
    """
    load: Any = PreTrainedModel.from_pretrained
    # Nothing is looked for on the hub, which some classes do where they are given no folder.
    return load.__func__(model_class, folder, output_loading_info=True, local_files_only=True, **options)


def family_in(model: PreTrainedModel) -> Family:
    """Return the table of a model's mixers: its own path and names, and tensors as it joins and divides them.

    Raises UnknownArchitecture if no table knows it.
    """
    return family_of(model.config.to_dict(), dict(model.named_parameters())).in_model


def vocabulary_of(model: PreTrainedModel) -> int:
    """Return the number of token ids of a model; the config of a larger one has it with the language model's."""
    return model.config.get_text_config().vocab_size


def outputs_of(model: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[B, T, U]`` of a pass without a cache, or of a model without a head for text its last hidden
    states ``[B, T, D]``."""
    if has_head(model):
        return model(input_ids=tokens_BT, use_cache=False).logits
    return model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state


def has_head(model: PreTrainedModel) -> bool:
    """Return whether a model predicts tokens."""
    return model.get_output_embeddings() is not None


def refuse_headless(model: PreTrainedModel, path: object) -> None:
    """Raise KeyreduceError if a model, which messages call ``path``, does not predict tokens."""
    if not has_head(model):
        raise KeyreduceError(
            f"{path} is a {type(model).__name__}, which predicts no tokens: it can be calibrated without gradients, "
            "pruned and verified, and its own figures are for you to measure"
        )

"""The library's own model of a config, built without weights on torch's meta device, to compare a checkpoint with.

It takes neither weights nor accelerate. The import of fla and transformers takes seconds: for what reads and writes
files alone, :mod:`keyreduce.families.mixer_tensors` says which tensors a mixer has.
"""

import copy
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import fla_torch  # before fla, which warns where there is no GPU: this silences it
import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

import keyreduce.models.delta_net_2  # noqa: F401  (registers itself, and fla's models)
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError, UnknownArchitecture, reason
from keyreduce.families.mixer_tensors import refuse_faults, refuse_more_layers
from keyreduce.models.classes import class_of, config_for, family_in
from keyreduce.models.loading import prepare_backend, silenced

_META = torch.device("meta")
# Up to transformers 5.15 this names how tensors are divided among processes, and must be given.
_NO_PLAN: dict = {"tp_plan": None} if "tp_plan" in signature(convert_and_load_state_dict_in_model).parameters else {}


def language_model(config: Mapping) -> tuple[type[PreTrainedModel], PretrainedConfig]:
    """Return the class of a config's model and its config; of a larger model they may be those of a part.

    See :func:`keyreduce.models.classes.class_of`.

    Raises UnknownArchitecture if transformers has no such class, with fla's and keyreduce's own registered.
    """
    if not fla_torch.is_enabled():
        # fla builds no layer of softmax attention where flash-attn is not installed; our backend stands in for it.
        prepare_backend(torch.device("cpu"))
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnknownArchitecture(f"transformers knows no model_type {model_type!r}")
    theirs = AutoConfig.for_model(**config)
    model_class = class_of(theirs)
    if model_class is None:
        raise UnknownArchitecture(f"transformers has no language model of model_type {model_type!r}")
    return model_class, config_for(model_class, theirs)


def build_model(config: Mapping, device: torch.device = _META, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the language model of a config in evaluation mode: without numbers, or on a device with random ones.

    Raises:
        UnknownArchitecture: see :func:`language_model`.
        KeyreduceError: no model is made from the config.
        torch.OutOfMemoryError: the device has no room for it.
    """
    try:
        with silenced():
            model_class, theirs = language_model(config)
            with device:
                model = model_class._from_config(theirs, dtype=dtype)
                return model.to(device=device).eval()  # pyright: ignore[reportCallIssue]  (of a decorator)
    except (KeyreduceError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # A config that no model would have makes its constructor raise nearly anything.
        raise KeyreduceError(f"no model is made from its config.json: {reason(error)}") from error


def build_mixer(
    config: Mapping, layer: int, device: torch.device = _META, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Return the language model of a config without numbers, but for a layer's mixer: random ones, on a device.

    A large model takes no more memory than this mixer does. It is initialised as the model's class does it.

    Raises what :func:`build_model` does.
    """
    model = build_model(config, dtype=dtype)
    # Of a larger model this is the language model alone, whose mixers are at another path.
    path = family_in(model).mixer.format(layer=layer)
    mixer = model.get_submodule(path).to_empty(device=device)
    with torch.no_grad():
        mixer.apply(model._init_weights)
    return model


def check_loading(config: Mapping, shapes: Mapping[str, Sequence[int]], path: Path) -> PreTrainedModel:
    """Refuse a checkpoint that transformers would not load whole, and return the model on torch's meta device.

    What a model's class forgives is forgiven, and of tied weights one is enough. ``path`` is what to call it.

    Raises:
        UnknownArchitecture: nothing can be said of such a model; the checkpoint may be right.
        KeyreduceError: tensors are missing, left over or of another shape, or no model is made from the config.
    """
    if "quantization_config" in config:
        raise UnknownArchitecture("the model is quantised, and what is built here has none of the tensors of that")
    refuse_more_layers(config, len(shapes), path)
    try:
        model = build_model(config)
    except UnknownArchitecture:
        raise
    except KeyreduceError as error:
        raise KeyreduceError(f"{path}: {error}") from None
    # What from_pretrained does with `device_map="meta"`, for which it would take accelerate.
    mapping: Any = copy.deepcopy(get_model_conversion_mapping(model))
    for conversion in mapping:
        if getattr(conversion, "force_cpu", False):
            conversion.force_cpu = False  # there are no numbers to be put together on a CPU
    settings = LoadStateDictConfig(device_map={"": "meta"}, ignore_mismatched_sizes=True, weight_mapping=mapping)
    tensors = {name: torch.empty(tuple(shape), device=_META) for name, shape in shapes.items()}
    try:
        with silenced():
            report, _ = convert_and_load_state_dict_in_model(model, tensors, settings, **_NO_PLAN)
            tied = model.all_tied_weights_keys
            if not report.missing_keys.isdisjoint({*tied, *tied.values()}):
                # Where nothing is missing, transformers up to 5.12 would compare numbers, which there are none of here.
                model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
            model._adjust_missing_and_unexpected_keys(report)
    except Exception as error:
        # Tensors of any shape at all are put together here.
        raise KeyreduceError(f"{path}: transformers does not load it: {reason(error)}") from error
    refuse_faults(
        path,
        missing=sorted(report.missing_keys),
        left_over=sorted(report.unexpected_keys),
        reshaped={name: (found, wanted) for name, found, wanted in sorted(report.mismatched_keys)},
    )
    return model


def check_source(source: Checkpoint) -> PreTrainedModel:
    """Refuse an open checkpoint that transformers would not load whole; see :func:`check_loading`."""
    return check_loading(source.config, source.shapes, source.path)

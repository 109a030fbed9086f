"""Whether transformers would load a checkpoint whose tensors it renames or joins: it does so once, without numbers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from keyreduce.errors import KeyreduceError, reason
from keyreduce.families import FAMILIES
from keyreduce.models.skeleton import Skeleton, UnknownArchitecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LISTED = 10


def check_loading(
    skeleton: Skeleton, config: Mapping, shapes: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Refuse a checkpoint that does not hold what its config asks for, by the quicker of two ways.

    Args:
        skeleton: started already; where files name or divide tensors otherwise than the model does, it cannot tell.
        config, shapes, path: see :func:`rehearse_loading`.

    Raises:
        UnknownArchitecture: nothing can be said of such a model; the checkpoint may be right.
        KeyreduceError: see :meth:`keyreduce.models.skeleton.Skeleton.check`.
    """
    try:
        skeleton.check(config, shapes, path)
    except UnknownArchitecture:
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise
        rehearse_loading(config, shapes, path)


def rehearse_loading(config: Mapping, shapes: Mapping[str, Sequence[int]], path: Path) -> "PreTrainedModel":
    """Refuse a checkpoint that transformers would not load whole, on torch's meta device.

    Args:
        config: the content of config.json.
        shapes: tensor name -> shape, of the whole checkpoint.
        path: what to call it.

    Returns:
        The model, on that device.

    Raises:
        KeyreduceError: tensors are missing, left over or of another shape, or no model is made from the config.
    """
    import fla_torch  # noqa: F401  (before fla, which warns where there is no GPU: this silences it)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    tensors = {name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()}
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        their_config = AutoConfig.for_model(**config)
        model_class = AutoModelForCausalLM._model_mapping[type(their_config)]
        if not isinstance(their_config, model_class.config_class):
            their_config = their_config.get_text_config()  # the language model of a larger one
        model, report = model_class.from_pretrained(
            None,
            config=their_config,
            state_dict=tensors,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        # A config that no model would have makes its constructor raise nearly anything.
        raise KeyreduceError(f"{path}: transformers does not load it: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
    faults = {
        "missing": sorted(report["missing_keys"]),
        "left over": sorted(report["unexpected_keys"]),
        "of another shape": [
            f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in sorted(report["mismatched_keys"])
        ],
    }
    told = [
        f"{what}: {', '.join(names[:_LISTED])}" + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
        for what, names in faults.items()
        if names
    ]
    if told:
        raise KeyreduceError(f"the tensors of {path} are not those that its config.json asks for; {'; '.join(told)}")
    return model

"""Low-rank additions to a model's projections, by peft (Hu et al., arXiv:2106.09685), and what they become at the end.

A name here is a module's full name in the model: ``model.layers.0.attn.q_proj``.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family
from keyreduce.families.axes import Part, parts_of
from keyreduce.recovery.training.settings import Training

_ATTENDED = {Part.QUERY, Part.KEY, Part.VALUE}


def find_targets(model: PreTrainedModel, family: Family, asked: Sequence[str]) -> list[str]:
    """Return the names of the linear layers that get an addition.

    Args:
        model: the model.
        family: its family, whose table says which projections of its mixers make q, k and v.
        asked: what a module's name ends in, instead of that; ``q_proj``, or more of the name.

    Raises:
        KeyreduceError: one of ``asked`` is the end of no linear layer's name, or the family has no such projection.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if asked:
        found = {end: [name for name in linear if f".{name}".endswith(f".{end}")] for end in asked}
        for end, names in found.items():
            if not names:
                ends = sorted({name.rpartition(".")[2] for name in linear})
                raise KeyreduceError(f"`lora_targets` {end} matches no linear layer; there are {', '.join(ends)}")
        return sorted({name for names in found.values() for name in names})
    projections = [
        name.removesuffix(".weight")
        for name, axes in family.tensors.items()
        if len(axes) == 2 and axes[1] == Part.HIDDEN and _ATTENDED & set(parts_of(axes[0]))
    ]
    mixers = [family.mixer.format(layer=layer) for layer in family.mixer_layers(model.config.to_dict())]
    wanted = {f"{mixer}.{projection}" for mixer in mixers for projection in projections}
    if not wanted & set(linear):
        raise KeyreduceError(f"{family.model_type} has no projection of q, k or v; name others with `lora_targets`")
    return sorted(wanted & set(linear))


def add_lora(model: PreTrainedModel, targets: Sequence[str], settings: Training, seed: int) -> nn.Module:
    """Return the model with additions that change nothing yet; they alone are trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=list(targets), bias="none", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def merge_lora(model: nn.Module) -> PreTrainedModel:
    """Return the model with the additions added up into its weights, in float32."""
    return model.float().merge_and_unload()

"""Low-rank additions to a model's projections, by peft (Hu et al., arXiv:2106.09685), added and merged.

A name here is a module's full name in the model: ``model.layers.0.attn.q_proj``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from keyreduce.errors import KeyreduceError
from keyreduce.families import Family
from keyreduce.families.axes import Part, parts_of
from keyreduce.recovery.modes import Training

_ATTENDED = {Part.QUERY, Part.KEY, Part.VALUE}


def find_targets(model: PreTrainedModel, family: Family, asked: Sequence[str]) -> list[str]:
    """Return the linear layers whose names end in one of ``asked``; without, the projections that make q, k and v.

    Raises:
        KeyreduceError: one of ``asked`` is the end of no linear layer's name, or the family has no such projection.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: set[str] = set()
    for end in asked:
        matching = {name for name in linear if f".{name}".endswith(f".{end}")}
        if not matching:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise KeyreduceError(f"`lora_targets` {end} matches no linear layer; there are {', '.join(ends)}")
        found |= matching
    if asked:
        return sorted(found)
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
    """Return the model with low-rank additions, which alone are trained; until then its output stays the same."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # pyright: ignore[reportArgumentType]  (peft takes numbers of both kinds)
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def merge_lora(model: nn.Module) -> PreTrainedModel:
    """Return the model with the additions added to its weights, in float32."""
    whole: Any = model.float()  # peft makes methods of the kind of addition known at run time only
    return whole.merge_and_unload()

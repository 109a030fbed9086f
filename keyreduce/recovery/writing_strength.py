"""The writing strength that a model was trained with, given back to a pruned one before its layers are recovered.

A cut that no recovery follows lowers the writing strength (:mod:`keyreduce.pruning.corrections`). With the output
projection refitted, the strength that the dense model has is better.

Shapes: H key heads and W value heads that stay, D hidden.
"""

from collections.abc import Mapping

import torch

from keyreduce.checkpoint.record import Record
from keyreduce.families import Part
from keyreduce.families.axes import Axis, parts_of, place_of
from keyreduce.models.loading import LoadedModel


def corrected_heads(record: Record) -> dict[int, torch.Tensor]:
    """Return layer -> the value heads of the dense model that stay, where pruning changed their writing strength.

    It is empty where nothing changed it, or the whole model was trained since.
    """
    if record.repairs or not any("correction" in layer for step in record.steps for layer in step["layers"].values()):
        return {}
    found: dict[int, torch.Tensor] = {}
    for step in record.steps:
        for name, cut in step["layers"].items():
            group = cut["before"]["value_heads"] // cut["before"]["key_heads"]
            heads_W = (torch.tensor(cut["heads"])[:, None] * group + torch.arange(group)).flatten()
            found[int(name)] = found[int(name)][heads_W] if int(name) in found else heads_W
    return found


@torch.no_grad()
def restore_writing_strength(dense: LoadedModel, pruned: LoadedModel, heads: Mapping[int, torch.Tensor]) -> None:
    """Copy the rows that give the writing strength of some of the dense model's value heads, in place."""
    family = pruned.family
    for name, axes in family.tensors.items():
        if Part.BETA not in parts_of(axes[0]) or not family.asks_for(pruned.model.config.to_dict(), name):
            continue
        inside = family.inside.get(name, name)
        for layer, heads_W in heads.items():
            theirs, ours = (
                model.model.get_parameter(f"{family.mixer.format(layer=layer)}.{inside}") for model in (dense, pruned)
            )
            rows_W, own_W = _rows(dense, axes[0], layer), _rows(pruned, axes[0], layer)
            ours[own_W] = theirs[rows_W[heads_W]].to(ours)


def _rows(loaded: LoadedModel, axis: Axis, layer: int) -> torch.Tensor:
    sizes = loaded.family.sizes(loaded.model.config.to_dict(), layer)
    found = place_of(axis, Part.BETA, sizes.lengths, sizes.key_heads)
    return torch.arange(sizes.value_heads) if found is None else found

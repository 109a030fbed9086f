"""The four projections of a mixer that calibration looks into, found through the family's table by what they map."""

import torch

from keyreduce.families import Family, MixerSizes, Part
from keyreduce.families.axes import parts_of
from keyreduce.families.layout import place_of

PROJECTIONS = {"query": Part.QUERY, "key": Part.KEY, "value": Part.VALUE, "output": Part.VALUE}
"""Word -> the channels, which are rows of the weight, but of the output projection columns."""


def projection_name(family: Family, layer: int, word: str) -> str:
    """Return the full name of a projection's weight in the model; a weight may hold other projections too."""
    return family.tensor_name(layer, _short_name(family, word))


def projection_weight(family: Family, sizes: MixerSizes, word: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a projection's part of a weight, with one row a channel: ``[H * K, D]`` or ``[W * V, D]``.

    Args:
        family: its table says where in the weight the projection is.
        sizes: the mixer's sizes.
        word: which projection.
        weight: the tensor of :func:`projection_name`, or one of its shape.
    """
    axes = family.tensors[_short_name(family, word)]
    if word == "output":
        return weight.T
    rows = place_of(axes[0], PROJECTIONS[word], sizes.lengths, sizes.key_heads)
    return weight if rows is None else weight[rows.to(weight.device)]


def _short_name(family: Family, word: str) -> str:
    channels, hidden = (1, 0) if word == "output" else (0, 1)
    (name,) = [
        name
        for name, axes in family.tensors.items()
        if len(axes) == 2 and PROJECTIONS[word] in parts_of(axes[channels]) and axes[hidden] is Part.HIDDEN
    ]
    return name

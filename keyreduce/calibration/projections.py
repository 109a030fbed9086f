"""The four projections of a mixer that calibration observes, found in the family's table by the axes they map."""

import torch

from keyreduce.families import Family, MixerSizes, Part
from keyreduce.families.axes import parts_of, place_of

PROJECTIONS = {"query": Part.QUERY, "key": Part.KEY, "value": Part.VALUE, "output": Part.VALUE}
"""Projection -> its channels, which are the rows of its weight, or the columns for the output projection."""


def projection_name(family: Family, layer: int, projection: str) -> str:
    """Return the full name of a projection's weight in the model; a weight may hold other projections too."""
    return family.tensor_name(layer, _short_name(family, projection))


def projection_weight(family: Family, sizes: MixerSizes, projection: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a projection's part of a weight, with one row for each channel: ``[H * K, D]`` or ``[W * V, D]``.

    ``weight`` is the tensor of :func:`projection_name`, or another one of its shape.
    """
    axes = family.tensors[_short_name(family, projection)]
    if projection == "output":
        return weight.T
    rows = place_of(axes[0], PROJECTIONS[projection], sizes.lengths, sizes.key_heads)
    return weight if rows is None else weight[rows.to(weight.device)]


def _short_name(family: Family, projection: str) -> str:
    channels, hidden = (1, 0) if projection == "output" else (0, 1)
    matrices = {name: axes for name, axes in family.tensors.items() if len(axes) == 2 and axes[hidden] is Part.HIDDEN}
    (name,) = (name for name, axes in matrices.items() if PROJECTIONS[projection] in parts_of(axes[channels]))
    return name

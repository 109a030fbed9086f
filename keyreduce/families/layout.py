"""Where on an axis each part's entries are, as index vectors.

Shapes: H key heads, P entries of a part, N entries of an axis.
"""

from collections.abc import Mapping

import torch

from keyreduce.families.axes import Axis, Joined, Part, length_of


def places(axis: Axis, lengths: Mapping[Part, int], key_heads: int) -> list[tuple[Part, torch.Tensor]]:
    """Return, part by part, the places ``[P]`` on an axis that hold its entries, in the part's own order.

    Args:
        axis: what the axis holds.
        lengths: how many entries each of its parts has.
        key_heads: H, by which an axis may be divided.
    """
    if not isinstance(axis, Joined):
        return [(axis, torch.arange(lengths[axis]))]
    heads = key_heads if axis.by_key_head else 1
    place_HN = torch.arange(length_of(axis, lengths)).view(heads, -1)
    split = place_HN.split([lengths[part] // heads for part in axis.parts], dim=1)
    return [(part, place_HP.flatten()) for part, place_HP in zip(axis.parts, split, strict=True)]


def kept_places(
    axis: Axis,
    kept: Mapping[Part, torch.Tensor],
    before: tuple[Mapping[Part, int], int],
    after: tuple[Mapping[Part, int], int],
) -> torch.Tensor:
    """Return the places of an axis that stay, in the order that the axis has afterwards.

    Args:
        axis: what the axis holds.
        kept: part -> its entries that stay, in order.
        before, after: lengths of the parts, and number of key heads, before and after.
    """
    index = torch.empty(length_of(axis, after[0]), dtype=torch.int64)
    for (part, old_P), (_, new_P) in zip(places(axis, *before), places(axis, *after), strict=True):
        index[new_P] = old_P[kept[part]]
    return index


def place_of(axis: Axis, part: Part, lengths: Mapping[Part, int], key_heads: int) -> torch.Tensor | None:
    """Return the places of a part's entries; None if they are the whole axis in order."""
    if not isinstance(axis, Joined):
        return None
    return next(place_P for found, place_P in places(axis, lengths, key_heads) if found is part)

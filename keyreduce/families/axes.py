"""What one axis of a mixer's tensor holds, and where: a single part, or several parts in one of two orders.

Shapes: H key heads, P entries of a part, N entries of an axis.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # the command line reads the tables when it is loaded, and torch takes a second


class Part(enum.Enum):
    """What one axis, or a stretch of one, holds in order.

    K key channels and V value channels of a head.
    """

    QUERY = "the K query channels of key head 0, then of head 1, ..."
    KEY = "the K key channels of key head 0, then of head 1, ..."
    VALUE = "the V value channels of value head 0, then of head 1, ..."
    GATE = "the output gate of each value channel, in the same order"
    DECAY = "the K key channels of value head 0, then of head 1, ...: each decays in its own time"
    SHARED_VALUE = "V value channels that all heads share"
    KEY_HEAD = "one entry for each key head"
    VALUE_HEAD = "one entry for each value head"
    BETA = "the writing strength of each value head, before its sigmoid"
    HEAD_OR_ALL = "one entry for each key head, or a single one for all heads"
    DECAY_RANK = "the V channels through which the hidden ones reach the decay, in any linear combination"
    GATE_RANK = "the V channels through which the hidden ones reach the output gate, in any linear combination"
    HIDDEN = "the model's hidden channels"
    TAPS = "the taps of a convolution, one a token"
    OTHER = "a single entry"


@dataclass(frozen=True)
class Joined:
    """An axis of several parts.

    Attributes:
        parts: what they are, in order; a part may come twice.
        by_key_head: the parts of key head 0 (with all the value heads that it serves), then those of key head 1, ...;
            otherwise all of the first part, then all of the second, ...
    """

    parts: tuple[Part, ...]
    by_key_head: bool = False


Axis = Part | Joined


def parts_of(axis: Axis) -> tuple[Part, ...]:
    """Return the parts that an axis holds."""
    return axis.parts if isinstance(axis, Joined) else (axis,)


def length_of(axis: Axis, lengths: Mapping[Part, int]) -> int:
    """Return how long an axis is, given the lengths of its parts."""
    return sum(lengths[part] for part in parts_of(axis))


def places(axis: Axis, lengths: Mapping[Part, int], key_heads: int) -> "list[tuple[Part, torch.Tensor]]":
    """Return, part by part, the places ``[P]`` on an axis that hold its entries, in the part's own order."""
    import torch

    if not isinstance(axis, Joined):
        return [(axis, torch.arange(lengths[axis]))]
    heads = key_heads if axis.by_key_head else 1
    place_HN = torch.arange(length_of(axis, lengths)).view(heads, -1)
    split = place_HN.split([lengths[part] // heads for part in axis.parts], dim=1)
    return [(part, place_HP.flatten()) for part, place_HP in zip(axis.parts, split, strict=True)]


def kept_places(
    axis: Axis,
    kept: "Mapping[Part, torch.Tensor]",
    before: tuple[Mapping[Part, int], int],
    after: tuple[Mapping[Part, int], int],
) -> "torch.Tensor":
    """Return the places ``[N]`` of an axis that stay, in the order that the axis has afterwards.

    ``kept`` is part -> its entries that stay, in order; ``before`` and ``after`` are the lengths of the parts and the
    number of key heads.
    """
    import torch

    index = torch.empty(length_of(axis, after[0]), dtype=torch.int64)
    for (part, old_P), (_, new_P) in zip(places(axis, *before), places(axis, *after), strict=True):
        index[new_P] = old_P[kept[part]]
    return index


def place_of(axis: Axis, part: Part, lengths: Mapping[Part, int], key_heads: int) -> "torch.Tensor | None":
    """Return the places of a part's entries; None if they are the whole axis in order."""
    if not isinstance(axis, Joined):
        return None
    return next(place_P for found, place_P in places(axis, lengths, key_heads) if found is part)

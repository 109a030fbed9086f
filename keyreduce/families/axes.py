"""What one axis of a tensor of the mixer holds: a part, or several of them in one of two orders."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass


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
    VALUE_HEAD = "one entry for each value head"
    HEAD_OR_ALL = "one entry for each key head, or a single one for all heads"
    DECAY_RANK = "the V channels through which the hidden ones reach the decay, mixed at will"
    GATE_RANK = "the V channels through which the hidden ones reach the output gate, mixed at will"
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

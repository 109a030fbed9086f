"""The formats in which an engine may keep the recurrent state, and the bytes that a sequence then takes.

A row of a head's state is the K numbers of one value channel: engines keep the state as ``[V, K]``, and a decode kernel
has whole rows at hand when it writes them, so that a scale costs no second pass. A column is the V numbers of one key
channel. A kernel that has 32 rows at hand can give each 32 numbers of a column a scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from keyreduce.errors import KeyreduceError

if TYPE_CHECKING:
    # Only for the types: the names of the formats appear in the help, which must not wait for torch.
    from keyreduce.families import MixerSizes

StateDtype = Literal[
    "float32",
    "bfloat16",
    "float16",
    "fp8",
    "fp8-head",
    "int8",
    "int8-key",
    "int8-key-32",
    "int4",
    "int4-32",
    "int4-rotated",
    "int4-key",
    "int4-key-32",
]
StateChoice = Literal[StateDtype, "auto"]
"""A format, or a choice of one for each head."""
SCALE_BYTES = 4  # a scale is a float32


class StateFormat(NamedTuple):
    """How a head's state is stored.

    Attributes:
        bits: those of one number.
        scaled: what shares a scale: a "row", the K numbers of a value channel; a "key" channel's V numbers, a column;
            or all numbers of a "head". None where there is no scale.
        group: how many neighbours in a row or column share a scale; None where that is all.
        rotated: whether each row is multiplied by a Hadamard matrix before it is rounded.
    """

    bits: int
    scaled: Literal["row", "key", "head"] | None = None
    group: int | None = None
    rotated: bool = False

    def bytes(self, head_k_dim: int, head_v_dim: int) -> int:
        """Return the bytes of the state of one head, its scales included."""
        across, along = (head_v_dim, head_k_dim) if self.scaled == "row" else (head_k_dim, head_v_dim)
        groups = math.ceil(along / self.group) if self.group else 1
        scales = {None: 0, "head": 1}.get(self.scaled, across * groups)
        return math.ceil(head_k_dim * head_v_dim * self.bits / 8) + SCALE_BYTES * scales


FORMATS: dict[str, StateFormat] = {
    "float32": StateFormat(32),
    "bfloat16": StateFormat(16),
    "float16": StateFormat(16),
    "fp8": StateFormat(8, "row"),
    "fp8-head": StateFormat(8, "head"),
    "int8": StateFormat(8, "row"),
    "int8-key": StateFormat(8, "key"),
    "int8-key-32": StateFormat(8, "key", group=32),
    "int4": StateFormat(4, "row"),
    "int4-32": StateFormat(4, "row", group=32),
    "int4-rotated": StateFormat(4, "row", rotated=True),
    "int4-key": StateFormat(4, "key"),
    "int4-key-32": StateFormat(4, "key", group=32),
}
StateDtypes = str | Mapping[int, Sequence[str]]
"""One format for all heads, or layer -> the format of each value head."""


def formats_of(dtypes: StateDtypes, sizes: Mapping[int, MixerSizes]) -> dict[int, list[str]]:
    """Return layer -> the format of each value head, for the layers that ``sizes`` has.

    Raises KeyreduceError if a format is unknown, a layer is missing, or its formats are not as many as its value heads.
    """
    found = {}
    for layer, size in sizes.items():
        chosen = [dtypes] * size.value_heads if isinstance(dtypes, str) else list(dtypes.get(layer, ()))
        if len(chosen) != size.value_heads:
            raise KeyreduceError(
                f"`state_dtype` has {len(chosen)} formats for the {size.value_heads} value heads of layer {layer}"
            )
        for name in chosen:
            if name not in FORMATS:
                raise KeyreduceError(f"`state_dtype` is {name!r}; take one of {', '.join(FORMATS)}")
        found[layer] = chosen
    return found


def bytes_of(dtypes: StateDtypes, sizes: Mapping[int, MixerSizes]) -> int:
    """Return the bytes of recurrent state that one sequence holds in layers of these sizes, scales included.

    Raises KeyreduceError as :func:`formats_of` does.
    """
    return sum(
        FORMATS[name].bytes(sizes[layer].head_k_dim, sizes[layer].head_v_dim)
        for layer, names in formats_of(dtypes, sizes).items()
        for name in names
    )

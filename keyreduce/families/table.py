"""What a family's table is made of: the parts that an axis can hold, and the config fields that say the sizes.

Names: H key heads, W value heads (a multiple of H), K key channels and V value channels of a head, D hidden.
"""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from keyreduce.errors import KeyreduceError


class Part(enum.Enum):
    """What one axis of a tensor of the mixer holds, in order."""

    QUERY = "the K query channels of key head 0, then of head 1, ..."
    KEY = "the K key channels of key head 0, then of head 1, ..."
    VALUE = "the V value channels of value head 0, then of head 1, ..."
    SHARED_VALUE = "V value channels that all heads share"
    VALUE_HEAD = "one entry for each value head"
    HIDDEN = "the model's hidden channels"
    OTHER = "nothing that pruning touches: convolution taps and the like"


class MixerSizes(NamedTuple):
    """The sizes of one mixer layer; the recurrent state of a sequence is ``value_heads x head_k_dim x head_v_dim``."""

    key_heads: int
    value_heads: int
    head_k_dim: int
    head_v_dim: int

    @property
    def state_elements(self) -> int:
        """Numbers in the recurrent state of one sequence in one layer."""
        return self.value_heads * self.head_k_dim * self.head_v_dim


@dataclass(frozen=True)
class Field:
    """A size that the config says outright."""

    name: str
    default: "float | Field | None" = None
    """What holds when the config does not have the field (or has null): a number, or what another field says."""

    def read(self, config: Mapping) -> float:
        value = config.get(self.name)
        if value is None and isinstance(self.default, Field):
            return self.default.read(config)
        value = self.default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise KeyreduceError(f"config.json: {self.name} is {value!r}, where a positive number belongs")
        return value

    def write(self, config: dict, size: int) -> None:
        config[self.name] = size


@dataclass(frozen=True)
class Ratio:
    """A size that the config says as a ratio: ``size = config[name] * config[of] / config[over]``."""

    name: str
    default: float
    of: Field
    over: Field | None = None

    def read(self, config: Mapping) -> float:
        return Field(self.name, self.default).read(config) * self._base(config)

    def write(self, config: dict, size: int) -> None:
        base = self._base(config)
        ratio = size / base
        # Models get the size back as int(ratio * base): a ratio rounded down would lose a channel there.
        if int(ratio * base) < size:
            ratio = math.nextafter(ratio, math.inf)
        config[self.name] = ratio

    def _base(self, config: Mapping) -> float:
        return self.of.read(config) / (self.over.read(config) if self.over else 1)


@dataclass(frozen=True)
class Family:
    """One architecture, as a table.

    Attributes:
        model_type: the ``model_type`` of its config.json.
        mixer: the path of a layer's mixer in the model, with ``{layer}``.
        operators: the delta-rule functions that the mixer's module calls by these names, with keywords ``q`` and ``k``
            (shape ``[B, T, H, K]``).
        key_heads, value_heads, head_k_dim, head_v_dim: where the config says the sizes; a ratio may rest on a size
            before it, so they are written in this order.
        hidden, num_layers: where the config says the model's width and how many layers it has.
        softmax: the config field that says which layers have softmax attention for a mixer: an object with a list
            ``layers``, or a list of such objects.
        tensors: name below the mixer -> what each axis holds. A model need not have all of them.
    """

    model_type: str
    mixer: str
    operators: tuple[str, ...]
    key_heads: Field
    value_heads: Field
    head_k_dim: Field | Ratio
    head_v_dim: Field | Ratio
    hidden: Field
    num_layers: Field
    tensors: Mapping[str, tuple[Part, ...]]
    softmax: str = "attn"

    def sizes(self, config: Mapping) -> MixerSizes:
        """Read the sizes from a config.

        Raises:
            KeyreduceError: a field is missing, or a size is not a positive whole number, or heads do not divide.
        """
        values = {}
        for name in MixerSizes._fields:
            value = getattr(self, name).read(config)
            values[name] = round(value)
            if values[name] < 1 or not math.isclose(value, values[name], rel_tol=1e-5):
                raise KeyreduceError(f"config.json: its {name} comes to {value:g}, which is no size")
        sizes = MixerSizes(**values)
        if sizes.value_heads % sizes.key_heads:
            raise KeyreduceError(
                f"config.json: {sizes.value_heads} value heads cannot be shared out among {sizes.key_heads} key heads"
            )
        return sizes

    def resized(self, config: Mapping, sizes: MixerSizes) -> dict:
        """Return a copy of ``config`` that says ``sizes``; fields that say it already stay as they are."""
        changed = dict(config)
        for name, size in sizes._asdict().items():
            place = getattr(self, name)
            if round(place.read(changed)) != size or not math.isclose(place.read(changed), size, rel_tol=1e-5):
                place.write(changed, size)
        if self.sizes(changed) != sizes:
            raise KeyreduceError(f"a {self.model_type} config cannot say the sizes {tuple(sizes)}")
        return changed

    def axis_sizes(self, config: Mapping) -> dict[Part, int]:
        """Return how long an axis is that holds a part; OTHER is not the config's to say."""
        sizes = self.sizes(config)
        return {
            Part.QUERY: sizes.key_heads * sizes.head_k_dim,
            Part.KEY: sizes.key_heads * sizes.head_k_dim,
            Part.VALUE: sizes.value_heads * sizes.head_v_dim,
            Part.SHARED_VALUE: sizes.head_v_dim,
            Part.VALUE_HEAD: sizes.value_heads,
            Part.HIDDEN: round(self.hidden.read(config)),
        }

    def mixer_layers(self, config: Mapping) -> list[int]:
        """Return the numbers of the layers whose mixer holds a delta-rule state.

        Raises:
            KeyreduceError: the config does not say which layers those are.
        """
        specs = config.get(self.softmax) or []
        specs = [specs] if isinstance(specs, Mapping) else specs
        try:
            softmax_layers = {layer for spec in specs for layer in spec["layers"]}
        except (KeyError, TypeError):
            raise KeyreduceError(f"config.json: {self.softmax} does not list the layers of softmax attention") from None
        return [layer for layer in range(round(self.num_layers.read(config))) if layer not in softmax_layers]

    def tensor_name(self, layer: int, name: str) -> str:
        """Return the full name of a mixer's tensor."""
        return f"{self.mixer.format(layer=layer)}.{name}"

    def state_bytes(self, config: Mapping) -> int:
        """Return the bytes of recurrent state that one sequence holds in all layers, in float32."""
        return 4 * len(self.mixer_layers(config)) * self.sizes(config).state_elements


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
    GATE = "the output gate of each value channel, in the same order"
    SHARED_VALUE = "V value channels that all heads share"
    VALUE_HEAD = "one entry for each value head"
    HEAD_OR_ALL = "one entry for each key head, or a single one for all heads"
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
    """A size that the config says outright, the same for all layers."""

    name: str
    default: "float | Field | None" = None
    """What holds when the config does not have the field (or has null): a number, or what another field says."""

    def read(self, config: Mapping, layer: int = 0) -> float:
        """Return what ``config`` says of a layer."""
        value = config.get(self.name)
        if value is None and isinstance(self.default, Field):
            return self.default.read(config, layer)
        return _positive(self.name, self.default if value is None else value)

    def write(self, config: dict, size_of: Mapping[int, int], num_layers: int) -> None:
        """Let ``config`` say a size; ``size_of`` has the same one for every layer."""
        config[self.name] = next(iter(size_of.values()))


@dataclass(frozen=True)
class Ratio:
    """A size that the config says as a ratio: ``size = config[name] * config[of] / config[over]``.

    Attributes:
        name: the field that holds the ratio.
        default: what holds when the config does not have it.
        of, over: the fields it rests on.
        per_layer: whether the field may also be a list with a ratio for each layer of the model.
    """

    name: str
    default: float
    of: Field
    over: Field | None = None
    per_layer: bool = False

    def read(self, config: Mapping, layer: int = 0) -> float:
        """Return what ``config`` says of a layer."""
        return self._ratio(config, layer) * self._base(config)

    def write(self, config: dict, size_of: Mapping[int, int], num_layers: int) -> None:
        """Let ``config`` say the sizes: as one number where every layer has the same, else as a list."""
        base = self._base(config)
        ratio_of = {layer: _ratio_for(size, base) for layer, size in size_of.items()}
        if len(set(ratio_of.values())) == 1:
            config[self.name] = next(iter(ratio_of.values()))
            return
        # In a layer that has no mixer of this kind nobody reads it, but it is checked against the number of heads.
        any_ratio = next(iter(ratio_of.values()))
        config[self.name] = [ratio_of.get(layer, any_ratio) for layer in range(num_layers)]

    def _ratio(self, config: Mapping, layer: int) -> float:
        value = config.get(self.name)
        if self.per_layer and isinstance(value, list):
            if layer >= len(value):
                raise KeyreduceError(f"config.json: {self.name} lists {len(value)} layers, not layer {layer}")
            value = value[layer]
        return _positive(self.name, self.default if value is None else value)

    def _base(self, config: Mapping) -> float:
        return self.of.read(config) / (self.over.read(config) if self.over else 1)


def _positive(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise KeyreduceError(f"config.json: {name} is {value!r}, where a positive number belongs")
    return value


def _ratio_for(size: int, base: float) -> float:
    ratio = size / base
    # Models get the size back as int(ratio * base): a ratio rounded down would lose a channel there.
    return math.nextafter(ratio, math.inf) if int(ratio * base) < size else ratio


@dataclass(frozen=True)
class Family:
    """One architecture, as a table.

    Attributes:
        model_type: the ``model_type`` of its config.json.
        mixer: the path of a layer's mixer in the model, with ``{layer}``.
        operators: the delta-rule functions that the mixer's module calls by these names, with keywords ``q``, ``k``
            (shape ``[B, T, H, K]``) and ``v`` (``[B, T, W, V]``).
        key_heads, value_heads, head_k_dim, head_v_dim: where the config says the sizes; a ratio may rest on a size
            before it, so they are written in this order.
        hidden, num_layers: where the config says the model's width and how many layers it has.
        softmax: the config field that says which layers have softmax attention for a mixer: an object with a list
            ``layers``, or a list of such objects.
        shipped_by: what package has the model's class; serving engines know those of fla.
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
    shipped_by: str = "fla"

    def sizes(self, config: Mapping, layer: int = 0) -> MixerSizes:
        """Read the sizes of one layer's mixer from a config; only where a field is a list do layers differ.

        Raises:
            KeyreduceError: a field is missing, or a size is not a positive whole number, or heads do not divide.
        """
        values = {}
        for name in MixerSizes._fields:
            value = getattr(self, name).read(config, layer)
            values[name] = round(value)
            if values[name] < 1 or not math.isclose(value, values[name], rel_tol=1e-5):
                raise KeyreduceError(f"config.json: its {name} comes to {value:g}, which is no size")
        sizes = MixerSizes(**values)
        if sizes.value_heads % sizes.key_heads:
            raise KeyreduceError(
                f"config.json: {sizes.value_heads} value heads cannot be shared out among {sizes.key_heads} key heads"
            )
        return sizes

    def layer_sizes(self, config: Mapping) -> dict[int, MixerSizes]:
        """Return the sizes of every layer that holds a delta-rule state."""
        return {layer: self.sizes(config, layer) for layer in self.mixer_layers(config)}

    def resized(self, config: Mapping, sizes: Mapping[int, MixerSizes]) -> dict:
        """Return a copy of ``config`` that says the sizes of these layers; fields that say them already stay.

        Raises:
            KeyreduceError: a config of this family cannot say them.
        """
        changed = dict(config)
        for name in MixerSizes._fields:
            place = getattr(self, name)
            size_of = {layer: getattr(layer_sizes, name) for layer, layer_sizes in sizes.items()}
            if len(set(size_of.values())) > 1 and name not in self.per_layer:
                raise KeyreduceError(f"a {self.model_type} config says one {name} for all layers; cut them alike")
            if any(not math.isclose(place.read(changed, layer), size, rel_tol=1e-5) for layer, size in size_of.items()):
                place.write(changed, size_of, round(self.num_layers.read(changed)))
        for layer, layer_sizes in sizes.items():
            if self.sizes(changed, layer) != layer_sizes:
                raise KeyreduceError(f"a {self.model_type} config cannot say the sizes {tuple(layer_sizes)}")
        return changed

    @property
    def per_layer(self) -> set[str]:
        """The names of the sizes that may differ from layer to layer."""
        return {name for name in MixerSizes._fields if getattr(getattr(self, name), "per_layer", False)}

    def axis_sizes(self, config: Mapping, layer: int = 0) -> dict[Part, int]:
        """Return how long an axis of a layer's tensor is that holds a part; of others the config does not say it."""
        sizes = self.sizes(config, layer)
        return {
            Part.QUERY: sizes.key_heads * sizes.head_k_dim,
            Part.KEY: sizes.key_heads * sizes.head_k_dim,
            Part.VALUE: sizes.value_heads * sizes.head_v_dim,
            Part.GATE: sizes.value_heads * sizes.head_v_dim,
            Part.SHARED_VALUE: sizes.head_v_dim,
            Part.VALUE_HEAD: sizes.value_heads,
            Part.HEAD_OR_ALL: sizes.key_heads,
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
        return 4 * sum(sizes.state_elements for sizes in self.layer_sizes(config).values())


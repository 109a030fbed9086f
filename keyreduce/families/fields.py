"""Where a config gives a size, and which of its layers have a delta-rule state rather than softmax attention.

A size is given as a number or as a ratio of other sizes. The config is the language model's own; that of a larger model
has it in a section (:meth:`keyreduce.families.table.Family.language`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from keyreduce.errors import KeyreduceError


@dataclass(frozen=True)
class Field:
    """A size that the config gives as a number, the same for all layers.

    Attributes:
        name: the field.
        default: what holds when the config does not have it (or has null): a number, or what another field says.
        also: ``(section, name)`` of a second place that may say the size, and is believed where both do; an empty
            section is the config itself.
    """

    name: str
    default: "float | Field | Ratio | None" = None
    also: tuple[str, str] | None = None

    def read(self, config: Mapping, layer: int = 0) -> float:
        """Return what ``config`` says of a layer; raise KeyreduceError where it is no positive number."""
        if second := self._second(config):
            section, name, content = second
            return _positive(".".join(filter(None, (section, name))), content[name])
        value = config.get(self.name)
        if value is None and isinstance(self.default, Field | Ratio):
            return self.default.read(config, layer)
        return _positive(self.name, self.default if value is None else value)

    def write(self, config: dict, size_of: Mapping[int, int], num_layers: int) -> None:
        """Let ``config`` say a size; ``size_of`` has the same one for all layers. What it nests is copied."""
        size = next(iter(size_of.values()))
        if second := self._second(config):
            section, name, content = second
            config |= {section: {**content, name: size}} if section else {name: size}
            if self.name not in config:
                return
        config[self.name] = size

    def _second(self, config: Mapping) -> tuple[str, str, Mapping] | None:
        section, name = self.also or ("", "")
        content = config.get(section) if section else config
        return (section, name, content) if isinstance(content, Mapping) and name in content else None


@dataclass(frozen=True)
class Ratio:
    """A size that the config says as a ratio: ``size = config[name] * config[of] / config[over]``.

    Where it is ``per_layer`` the field may also be a list with a ratio for each layer of the model.
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
class SoftmaxList:
    """fla's way: a field with an object that lists the ``layers`` of softmax attention, or a list of such objects.

    Without the field every layer has a mixer.
    """

    name: str = "attn"

    def mixer_layers(self, config: Mapping, count: int) -> list[int]:
        """Return the layers with a mixer, of ``count``; raise KeyreduceError where the field does not list layers."""
        specs = config.get(self.name) or []
        specs = [specs] if isinstance(specs, Mapping) else specs
        try:
            softmax_layers = {layer for spec in specs for layer in spec["layers"]}
        except (KeyError, TypeError):
            raise KeyreduceError(f"config.json: {self.name} does not list the layers of softmax attention") from None
        return [layer for layer in range(count) if layer not in softmax_layers]


@dataclass(frozen=True)
class LayerTypes:
    """transformers' way: ``layer_types`` names the kind of each layer, ``linear_attention`` those with a mixer.

    Attributes:
        softmax: without ``layer_types``, the first layers of softmax attention, from zero; each of them comes again
            after every ``period`` layers.
        period: that number of layers.
        interval: the field by which the config may say another one; the first layers move by the difference.
        needs_softmax: whether the last layer has softmax attention where no other has.
        listed: the field of an object that lists the layers with a mixer by number, from one, as ``kda_layers``.
    """

    softmax: tuple[int, ...] = (3,)
    period: int = 4
    interval: str | None = "full_attention_interval"
    needs_softmax: bool = False
    listed: str | None = None

    def mixer_layers(self, config: Mapping, count: int) -> list[int]:
        """Return the layers with a mixer, of ``count``; raise KeyreduceError where the config does not say them."""
        kinds = config.get("layer_types")
        if kinds is None:
            return self._unnamed(config, count)
        if not isinstance(kinds, list) or len(kinds) != count:
            raise KeyreduceError(f"config.json: layer_types does not name the kind of each of {count} layers")
        return [layer for layer, kind in enumerate(kinds) if kind == "linear_attention"]

    def _unnamed(self, config: Mapping, count: int) -> list[int]:
        listed = config.get(self.listed) if self.listed else None
        if isinstance(listed, Mapping) and isinstance(listed.get("kda_layers"), list):
            return [layer for layer in range(count) if layer + 1 in listed["kda_layers"]]
        period = config.get(self.interval, self.period) if self.interval else self.period
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            raise KeyreduceError(f"config.json: {self.interval} is {period!r}, which is not a valid interval")
        first = [place + period - self.period for place in self.softmax]
        softmax = {layer for place in first for layer in range(place, count, period)}
        if not softmax and self.needs_softmax:
            softmax = {count - 1}
        return [layer for layer in range(count) if layer not in softmax]

"""What a family's table is made of: where the config says the sizes, and what the axes of the tensors hold.

Names: H key heads, W value heads (a multiple of H), K key channels and V value channels of a head, D hidden.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from keyreduce.errors import KeyreduceError
from keyreduce.families.axes import Axis, Joined, Part, length_of, parts_of
from keyreduce.families.fields import Field, LayerTypes, Ratio, SoftmaxList


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

    @property
    def lengths(self) -> dict[Part, int]:
        """How many entries each part has that the mixer's sizes say."""
        keys, values = self.key_heads * self.head_k_dim, self.value_heads * self.head_v_dim
        return {
            Part.QUERY: keys,
            Part.KEY: keys,
            Part.VALUE: values,
            Part.GATE: values,
            Part.DECAY: self.value_heads * self.head_k_dim,
            Part.SHARED_VALUE: self.head_v_dim,
            Part.KEY_HEAD: self.key_heads,
            Part.VALUE_HEAD: self.value_heads,
            Part.BETA: self.value_heads,
            Part.HEAD_OR_ALL: self.key_heads,
            Part.DECAY_RANK: self.head_v_dim,
            Part.GATE_RANK: self.head_v_dim,
        }


@dataclass(frozen=True)
class Family:
    """One architecture, as a table.

    Attributes:
        model_type: the ``model_type`` of its config.json.
        mixer: the path of a layer's mixer in the model and in its checkpoints, with ``{layer}``.
        operators: the delta-rule functions that the mixer's module calls by these names: with keywords ``q``, ``k``
            (shape ``[B, T, H, K]``) and ``v`` (``[B, T, W, V]``), or with these as the first arguments.
        key_heads, value_heads, head_k_dim, head_v_dim: where the config says the sizes; a ratio may rest on a size
            before it, so they are written in this order.
        hidden, num_layers: where the config says the model's width and how many layers it has.
        sections: of a larger model, of which the language model is a part: the field of its config that holds the
            language model's, or the fields that lead there; a config without them is the language model's own.
        tensors: name below the mixer in files -> what each axis holds. A config need not ask for all of them.
        taps: where the config says how many tokens a convolution spans.
        rule: what the field calls the way in which the state is written.
        paper: where that is published, as an arXiv number.
        per_head: the flag of a config by which each key head has a convolution kernel of its own, and not all one.
        switches: flags of a config by which its mixers have tensors or not -> what holds where it does not say it.
        only_with: name of a tensor -> what these flags are where a config asks for it; it always does for others.
        optional: names of tensors that a mixer may have though no config asks for them.
        layers: how the config says which layers have a mixer.
        shipped_by: what package has the model's class; serving engines know none of keyreduce's own.
        elsewhere: other paths of a mixer in checkpoints, as in those of a larger model of which this is a part.
        inside: name below the mixer in files -> its name in the model, only for those that have another one there.
            Those of one name are joined there, in this order, along the first axis.
        doubled: the switch of a config by which the writing strength is twice its sigmoid, and what holds where it does
            not say it.
        apart: name below the mixer in files -> the names in the model of those tensors into which the model divides it
            along the first axis, in order, each with what its first axis holds.
        per_channel: what each key channel does by itself, as the end of a sentence, so that no method may combine them.
        preconditioner: what part a sequence keeps one number for in a layer, in float32, beside the state; None where
            it keeps the state alone.
        tied: where a head has always as many key as value channels, why, and what to ask for.
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
    tensors: Mapping[str, tuple[Axis, ...]]
    taps: Field
    rule: str
    paper: str
    per_head: str | None = None
    switches: Mapping[str, bool] = field(default_factory=dict)
    only_with: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    layers: SoftmaxList | LayerTypes = SoftmaxList()
    shipped_by: str = "fla"
    elsewhere: tuple[str, ...] = ()
    inside: Mapping[str, str] = field(default_factory=dict)
    doubled: tuple[str, bool] = ("allow_neg_eigval", False)
    apart: Mapping[str, Mapping[str, Axis]] = field(default_factory=dict)
    sections: tuple[str, ...] = ()
    per_channel: str | None = None
    preconditioner: Part | None = None
    tied: str | None = None

    def language(self, config: Mapping) -> Mapping:
        """Return the config of the language model alone; raise KeyreduceError if what should hold it is no object."""
        for section in self.sections:
            config = config.get(section, config)
            if not isinstance(config, Mapping):
                raise KeyreduceError(f"config.json: {section} is {config!r}, where an object belongs")
        return config

    def width(self, config: Mapping) -> int:
        """Return the number of the model's hidden channels."""
        return round(self.hidden.read(self.language(config)))

    def depth(self, config: Mapping) -> int:
        """Return the number of the model's layers, with a mixer or without."""
        return round(self.num_layers.read(self.language(config)))

    def sizes(self, config: Mapping, layer: int = 0) -> MixerSizes:
        """Read the sizes of one layer's mixer from a config; only where a field is a list do layers differ.

        Raises KeyreduceError if a field is missing, or a size is not a positive whole number, or heads do not divide.
        """
        config, values = self.language(config), {}
        for name in MixerSizes._fields:
            value = getattr(self, name).read(config, layer)
            values[name] = round(value)
            if values[name] < 1 or not math.isclose(value, values[name], rel_tol=1e-5):
                raise KeyreduceError(f"config.json: its {name} comes to {value:g}, not a positive whole number")
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

        Raises KeyreduceError if a config of this family cannot say them.
        """
        changed = dict(config)
        language = self.copied_language(changed)
        for name in MixerSizes._fields:
            place = getattr(self, name)
            size_of = {layer: getattr(layer_sizes, name) for layer, layer_sizes in sizes.items()}
            if len(set(size_of.values())) > 1 and name not in self.per_layer:
                raise KeyreduceError(f"a {self.model_type} config says one {name} for all layers; cut all layers alike")
            found = {layer: place.read(language, layer) for layer in size_of}
            if any(not math.isclose(found[layer], size, rel_tol=1e-5) for layer, size in size_of.items()):
                place.write(language, size_of, self.depth(changed))
        for layer, layer_sizes in sizes.items():
            if self.sizes(changed, layer) != layer_sizes:
                raise KeyreduceError(f"a {self.model_type} config cannot say the sizes {tuple(layer_sizes)}")
        return changed

    def copied_language(self, changed: dict) -> dict:
        """Return the language model's part of a config, to be written into; what nests it is copied on the way."""
        self.language(changed)
        for section in self.sections:
            if section in changed:
                changed[section] = dict(changed[section])
                changed = changed[section]
        return changed

    def check_cut(self, after: MixerSizes) -> None:
        """Raise KeyreduceError for sizes that no model of this family can have."""
        if self.tied and after.head_k_dim != after.head_v_dim:
            raise KeyreduceError(f"{self.tied}, and not {after.head_k_dim} and {after.head_v_dim}")

    @property
    def per_layer(self) -> set[str]:
        """The names of the sizes that may differ from layer to layer."""
        return {name for name in MixerSizes._fields if getattr(getattr(self, name), "per_layer", False)}

    def axis_sizes(self, config: Mapping, layer: int = 0) -> dict[Part, int]:
        """Return how long an axis of a layer's tensor is that holds a part."""
        lengths, config = self.sizes(config, layer).lengths, self.language(config)
        return lengths | {
            Part.HEAD_OR_ALL: lengths[Part.HEAD_OR_ALL] if self.per_head and config.get(self.per_head) else 1,
            Part.HIDDEN: round(self.hidden.read(config)),
            Part.TAPS: round(self.taps.read(config)),
            Part.OTHER: 1,
        }

    def asks_for(self, config: Mapping, name: str) -> bool:
        """Return whether mixers of a config have a tensor, by its name below the mixer."""
        flags, config = self.only_with.get(name, {}), self.language(config)
        return all(bool(config.get(flag, self.switches[flag])) is value for flag, value in flags.items())

    def largest_beta(self, config: Mapping) -> float:
        """Return the largest writing strength that mixers of a config can have, 1 or 2."""
        name, default = self.doubled
        return 2.0 if self.language(config).get(name, default) else 1.0

    def mixer_layers(self, config: Mapping) -> list[int]:
        """Return the numbers of the layers whose mixer holds a delta-rule state."""
        return self.layers.mixer_layers(self.language(config), self.depth(config))

    def located(self, names: Iterable[str]) -> "Family":
        """Return the family with the path under which tensors of these names hold its mixers."""
        names = list(names)
        for path in (self.mixer, *self.elsewhere):
            start, end = path.split("{layer}")
            if any(name.startswith(start) and f"{end}." in name for name in names):
                return self if path == self.mixer else replace(self, mixer=path)
        return self._located_by_any_prefix(names) if self.sections else self

    def _located_by_any_prefix(self, names: Iterable[str]) -> "Family":
        """Return the family with the path that ends as its own does and holds most of its tensors."""
        start, end = self.mixer.split("{layer}")
        start, known = start.rpartition(".layers.")[1].lstrip("."), "|".join(map(re.escape, self.tensors))
        pattern = re.compile(rf"((?:.+\.)?){re.escape(start)}\d+{re.escape(end)}\.(?:{known})")
        prefixes = Counter(match[1] for match in map(pattern.fullmatch, names) if match)
        if not prefixes:
            return self
        prefix = max(prefixes, key=lambda prefix: prefixes[prefix])
        return replace(self, mixer=f"{prefix}{start}{{layer}}{end}")

    def within(self, model_type: str, section: str = "text_config") -> "Family":
        """Return the table of a larger model whose language model this is; its config holds this one in a section."""
        others = (self.mixer, *self.elsewhere)
        path = self.mixer.replace("model.", "model.language_model.", 0 if "language_model" in self.mixer else 1)
        return replace(
            self,
            model_type=model_type,
            mixer=path,
            elsewhere=tuple(other for other in others if other != path),
            sections=(section, *self.sections),
        )

    @property
    def in_model(self) -> "Family":
        """The table of the tensors that the model has, under its own names and as it joins and divides them."""
        tensors: dict[str, tuple[Axis, ...]] = {}
        for name, axes in self.tensors.items():
            if name in self.apart:
                tensors |= {inner: (axis, *axes[1:]) for inner, axis in self.apart[name].items()}
            elif pieces := self.joined_with(name):
                parts = [part for piece in pieces for part in parts_of(self.tensors[piece][0])]
                tensors[self.inside[name]] = (Joined(tuple(parts)), *axes[1:])
            else:
                tensors[self.inside.get(name, name)] = axes
        return replace(self, tensors=tensors, inside={}, apart={})

    def tensor_name(self, layer: int, name: str) -> str:
        """Return the full name of a mixer's tensor."""
        return f"{self.mixer.format(layer=layer)}.{name}"

    def joined_with(self, name: str) -> list[str]:
        """Return the names below the mixer of the pieces that the model joins, if ``name`` is one of them."""
        pieces = [other for other, inner in self.inside.items() if inner == self.inside.get(name)]
        return pieces if len(pieces) > 1 else []

    def divided(
        self, layer: int, name: str, shapes: Mapping[str, tuple[int, ...]], lengths: Mapping[Part, int]
    ) -> tuple[list[int], list[int]]:
        """Return how long the pieces of a joined tensor are in a checkpoint, and how long they should be.

        transformers, which puts them together when it loads, cuts them into equal ones when it saves.

        :meth:`joined_with` has the order of the pieces; one that is missing in ``shapes`` has no length.
        """
        pieces = self.joined_with(name)
        found = [(*shapes.get(self.tensor_name(layer, piece), ()), 0)[0] for piece in pieces]
        return found, [length_of(self.tensors[piece][0], lengths) for piece in pieces]

    def state_bytes(self, config: Mapping) -> int:
        """Return the bytes of recurrent state that one sequence holds in all layers, in float32."""
        return sum(map(self.layer_state_bytes, self.layer_sizes(config).values()))

    def layer_state_bytes(self, sizes: MixerSizes) -> int:
        """Return the bytes of recurrent state that one sequence holds in a layer of these sizes, in float32."""
        return 4 * sizes.state_elements + self.preconditioner_bytes(sizes)

    def preconditioner_bytes(self, sizes: MixerSizes) -> int:
        """Return those of them that are a preconditioner's, which stay float32 whatever the state is stored in."""
        return 0 if self.preconditioner is None else 4 * sizes.lengths[self.preconditioner]

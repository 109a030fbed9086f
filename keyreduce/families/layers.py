"""How a config of a hybrid says which layers hold a delta-rule state, and which have softmax attention."""

from collections.abc import Mapping
from dataclasses import dataclass

from keyreduce.errors import KeyreduceError


@dataclass(frozen=True)
class SoftmaxList:
    """fla's way: a field with an object that lists the ``layers`` of softmax attention, or a list of such objects.

    Attributes:
        name: the field; without it every layer has a mixer.
    """

    name: str = "attn"

    def mixer_layers(self, config: Mapping, count: int) -> list[int]:
        """Return the layers with a mixer, of ``count``.

        Raises:
            KeyreduceError: the field does not list layers.
        """
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
        section: the field of a larger model's config that holds the language model's, if it is one.
        first: without ``layer_types`` there is softmax attention in this layer and in every ``interval``-th after it;
            the config may say another interval as ``full_attention_interval``, and the first one goes with it.
        needs_softmax: whether the last layer has softmax attention where no other has.
        listed: the field of an object that lists the layers with a mixer by number, from one, as ``kda_layers``.
    """

    section: str | None = None
    first: int = 3
    interval: int = 4
    needs_softmax: bool = False
    listed: str | None = None

    def mixer_layers(self, config: Mapping, count: int) -> list[int]:
        """Return the layers with a mixer, of ``count``.

        Raises:
            KeyreduceError: the config does not say it for that many layers.
        """
        config = config.get(self.section, config) if self.section else config
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
        interval = config.get("full_attention_interval", self.interval)
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise KeyreduceError(f"config.json: full_attention_interval is {interval!r}, which is no interval")
        first = self.first + interval - self.interval
        softmax = set(range(first, count, interval))
        if not softmax and self.needs_softmax:
            softmax = {count - 1}
        return [layer for layer in range(count) if layer not in softmax]

"""The plan of a cut: what stays, and where the decision came from. It is data, written beside the checkpoint.

Shapes: H key heads and W value heads that stay, K key channels and V value channels of a head, R kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from keyreduce.families import MixerSizes


def value_heads_of(sizes: MixerSizes, heads_H: torch.Tensor) -> torch.Tensor:
    """Return the value heads ``[W]`` that some key heads serve, in order."""
    group = sizes.value_heads // sizes.key_heads
    return (heads_H[:, None] * group + torch.arange(group)).flatten()


@dataclass(frozen=True)
class LayerCut:
    """What stays of one layer's mixer.

    Attributes:
        before, after: its sizes.
        heads_H: the key heads that stay, each with all the value heads that it serves.
        key_HR: their key channels that stay; None where they are projected instead.
        value_WR: the value channels that stay, of each value head that does.
        projection_HKR: the projection of queries and keys, float64.
        report: target -> figures of the method, for the record.
    """

    before: MixerSizes
    after: MixerSizes
    heads_H: torch.Tensor
    key_HR: torch.Tensor | None
    value_WR: torch.Tensor
    projection_HKR: torch.Tensor | None = None
    report: Mapping[str, Mapping[str, list]] = field(default_factory=dict)

    @classmethod
    def of_nothing(cls, sizes: MixerSizes) -> "LayerCut":
        """Return the cut that leaves a layer as it is."""
        return cls(
            sizes,
            sizes,
            torch.arange(sizes.key_heads),
            torch.arange(sizes.head_k_dim).expand(sizes.key_heads, -1),
            torch.arange(sizes.head_v_dim).expand(sizes.value_heads, -1),
        )

    @property
    def value_heads_W(self) -> torch.Tensor:
        """The value heads that stay."""
        return value_heads_of(self.before, self.heads_H)

    def to_json(self) -> dict:
        """Return the cut as a JSON object; a projection is too large for one, and stands in a file of its own."""
        return {
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "heads": self.heads_H.tolist(),
            "key": None if self.key_HR is None else self.key_HR.tolist(),
            "value": self.value_WR.tolist(),
            "report": self.report,
        }


@dataclass(frozen=True)
class Plan:
    """One pruning step.

    Attributes:
        inputs: what decided it: source identity, calibration, method, targets, ratio, seed. Equal inputs give an
            equal result.
        layers: layer -> its cut.
    """

    inputs: Mapping
    layers: Mapping[int, LayerCut]

    @property
    def before(self) -> dict[int, MixerSizes]:
        """The sizes before the cut."""
        return {layer: cut.before for layer, cut in self.layers.items()}

    @property
    def after(self) -> dict[int, MixerSizes]:
        """The sizes after it."""
        return {layer: cut.after for layer, cut in self.layers.items()}

    def to_json(self) -> dict:
        """Return the plan as a JSON object."""
        return {"inputs": self.inputs, "layers": {str(layer): cut.to_json() for layer, cut in self.layers.items()}}

"""The plan of a pruning step: what stays, and what decided it. It is data, written beside the checkpoint.

Shapes: H key heads and W value heads that stay, K key channels and V value channels of a head, R kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from keyreduce.families import MixerSizes


def value_heads_of(sizes: MixerSizes, heads_H: torch.Tensor) -> torch.Tensor:
    """Return the value heads ``[W]`` that belong to some key heads, in order."""
    group = sizes.value_heads // sizes.key_heads
    return (heads_H[:, None] * group + torch.arange(group)).flatten()


@dataclass(frozen=True)
class Correction:
    """How what stays in a layer is changed to make good what the cut did to it (:mod:`keyreduce.pruning.corrections`).

    Attributes:
        columns_WVR: for each value head that stays, how the output projection's columns of all its channels make up
            those of the channels that stay.
        value_scale_W: the factor of the output projection's columns, for each value head that stays.
        beta_shift_W: what is added to the logit of the writing strength, for each value head that stays.
        constant_D: the direction of the mixer's input that is as good as constant.
    """

    columns_WVR: torch.Tensor
    value_scale_W: torch.Tensor
    beta_shift_W: torch.Tensor
    constant_D: torch.Tensor

    def to_json(self) -> dict:
        """Return the factors and shifts as a JSON object."""
        return {"value_scale": self.value_scale_W.tolist(), "beta_shift": self.beta_shift_W.tolist()}


@dataclass(frozen=True)
class LayerCut:
    """What stays of one layer's mixer.

    Attributes:
        before, after: the mixer's sizes.
        heads_H: the key heads that stay, each with all its value heads.
        key_HR: the key channels that stay in each of these heads; None if they are projected instead.
        value_WR: the value channels that stay in each value head that stays.
        projection_HKR: the projection of queries and keys, float64.
        report: target -> metrics of the method, for the record.
        correction: how what stays is changed; None leaves it exactly as it was.
    """

    before: MixerSizes
    after: MixerSizes
    heads_H: torch.Tensor
    key_HR: torch.Tensor | None
    value_WR: torch.Tensor
    projection_HKR: torch.Tensor | None = None
    report: Mapping[str, Mapping[str, list]] = field(default_factory=dict)
    correction: Correction | None = None

    @classmethod
    def of_nothing(cls, sizes: MixerSizes) -> "LayerCut":
        """Return the cut that leaves a layer unchanged."""
        key_HK = torch.arange(sizes.head_k_dim).expand(sizes.key_heads, -1)
        value_WV = torch.arange(sizes.head_v_dim).expand(sizes.value_heads, -1)
        return cls(sizes, sizes, torch.arange(sizes.key_heads), key_HK, value_WV)

    @property
    def value_heads_W(self) -> torch.Tensor:
        """The value heads that stay."""
        return value_heads_of(self.before, self.heads_H)

    def to_json(self) -> dict:
        """Return the cut as a JSON object, without the projection, which has a file of its own."""
        return {
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "heads": self.heads_H.tolist(),
            "key": None if self.key_HR is None else self.key_HR.tolist(),
            "value": self.value_WR.tolist(),
            "report": self.report,
        } | ({} if self.correction is None else {"correction": self.correction.to_json()})


@dataclass(frozen=True)
class Plan:
    """One pruning step.

    Attributes:
        inputs: everything that the plan depends on: source identity, calibration, method, targets, ratio, seed. Equal
            inputs give equal plans.
        layers: layer -> its cut.
        ran: target -> the method that chose.
        methods: the name of each of those -> its summary, its citation, and the options that it ran with.
    """

    inputs: Mapping
    layers: Mapping[int, LayerCut]
    ran: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, Mapping] = field(default_factory=dict)

    @property
    def after(self) -> dict[int, MixerSizes]:
        """Layer -> its sizes after the cut."""
        return {layer: cut.after for layer, cut in self.layers.items()}

    def to_json(self) -> dict:
        """Return the plan as a JSON object."""
        layers = {str(layer): cut.to_json() for layer, cut in self.layers.items()}
        return {"inputs": self.inputs, "layers": layers, "ran": self.ran, "methods": self.methods}

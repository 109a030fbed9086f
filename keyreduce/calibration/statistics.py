"""The running sums that calibration keeps: one set a layer, in float64, of a size that no number of tokens changes.

Shapes: T tokens, D hidden, H key heads, K key channels.
"""

from dataclasses import dataclass, fields

import torch

from keyreduce.errors import KeyreduceError

_UNIT_EPS = 1e-6
"""Added to the sum of squares, as fla and transformers do when they normalise q and k."""


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens, for one mixer layer; every tensor is float64.

    "As the operator receives them" means after convolution and activation, before the L2 norm.

    Attributes:
        input_square_D: squares of the mixer's input, per hidden channel (its second moment, times the tokens).
        query_sum_HK, key_sum_HK: q and k as the operator receives them.
        query_gram_HKK, key_gram_HKK: their Gram matrices, ``sum_t q_t q_t^T``.
        unit_query_gram_HKK, unit_key_gram_HKK: the same of q and k divided by their L2 norm.
        unit_query_sum_HK, unit_key_sum_HK: their sums.
    """

    input_square_D: torch.Tensor
    query_sum_HK: torch.Tensor
    key_sum_HK: torch.Tensor
    query_gram_HKK: torch.Tensor
    key_gram_HKK: torch.Tensor
    unit_query_sum_HK: torch.Tensor
    unit_key_sum_HK: torch.Tensor
    unit_query_gram_HKK: torch.Tensor
    unit_key_gram_HKK: torch.Tensor

    @classmethod
    def zeros(cls, hidden: int, key_heads: int, head_k_dim: int, device: torch.device) -> "LayerStatistics":
        """Return sums over no token."""
        size_of = {"D": hidden, "H": key_heads, "K": head_k_dim}
        shapes = {field.name: [size_of[axis] for axis in field.name.rsplit("_", 1)[1]] for field in fields(cls)}
        return cls(**{name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()})

    def add_input(self, hidden_BTD: torch.Tensor) -> None:
        """Add what one batch gives to the mixer."""
        self.input_square_D += hidden_BTD.double().square().sum(dim=(0, 1))

    def add_operands(self, query_BTHK: torch.Tensor, key_BTHK: torch.Tensor) -> None:
        """Add what one batch gives to the delta-rule operator."""
        for kind, operand_BTHK in (("query", query_BTHK), ("key", key_BTHK)):
            raw_HTK = operand_BTHK.double().flatten(0, 1).transpose(0, 1)
            unit_HTK = raw_HTK * torch.rsqrt(raw_HTK.square().sum(dim=-1, keepdim=True) + _UNIT_EPS)
            for prefix, rows_HTK in ((kind, raw_HTK), (f"unit_{kind}", unit_HTK)):
                getattr(self, f"{prefix}_sum_HK").add_(rows_HTK.sum(dim=1))
                getattr(self, f"{prefix}_gram_HKK").baddbmm_(rows_HTK.mT, rows_HTK)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return name -> sums, on the CPU."""
        return {field.name: getattr(self, field.name).cpu() for field in fields(self)}


@dataclass
class Statistics:
    """What a calibration file holds.

    Attributes:
        model: identity of the checkpoint that was calibrated (``Checkpoint.identity``).
        tokens: how many tokens the sums are over.
        layers: layer number -> its sums.
        inputs: what the sums were made from, for the record: text, settings, versions.
    """

    model: str
    tokens: int
    layers: dict[int, LayerStatistics]
    inputs: dict

    def check_finite(self) -> None:
        """Refuse sums that hold NaN or inf.

        Raises:
            KeyreduceError: names the first such sum and its layer.
        """
        for layer, statistics in self.layers.items():
            for name, tensor in statistics.tensors().items():
                if not torch.isfinite(tensor).all():
                    raise KeyreduceError(
                        f"activations of layer {layer} hold NaN or inf ({name.rsplit('_', 1)[0]}): "
                        "the model is damaged, or its activations overflow this dtype (try --dtype float32)"
                    )

"""The running sums that calibration keeps: one set a layer, in float64, of a size that no number of tokens changes.

Shapes: B rows, T tokens, D hidden, H key heads, K key channels, W value heads, V value channels, C = W * V.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch

from keyreduce.checkpoint.rewrite import is_finite
from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes

_UNIT_EPS = 1e-6
"""Added to the sum of squares, as fla and transformers do when they normalise q and k."""

TAYLOR = "taylor."
"""What the names of sums begin with that come from gradients."""


@dataclass
class TaylorSums:
    """What the loss says of the channels of one mixer's projections; every tensor is float64.

    With ``s_nc = sum_d W_cd dL_n/dW_cd`` for row n of the text and channel c of a projection, W its weight with one
    row a channel (the output projection's transpose) and L_n the mean cross entropy of the row's next-token
    predictions (nats):

    - ``signed``: ``sum_n s_nc``, to first order how much lower the loss would be without the channel (Ma et al.,
      "LLM-Pruner", arXiv:2305.11627, section 3.2);
    - ``squared``: ``sum_n s_nc^2``, the empirical Fisher information of a factor on the channel (Molchanov et al.,
      arXiv:1906.10771, section 3.1);
    - ``element``: ``sum_d |W_cd sum_n dL_n/dW_cd|``, weight by weight (LLM-Pruner, section 3.2).
    """

    signed_query_HK: torch.Tensor
    signed_key_HK: torch.Tensor
    signed_value_WV: torch.Tensor
    signed_output_WV: torch.Tensor
    squared_query_HK: torch.Tensor
    squared_key_HK: torch.Tensor
    squared_value_WV: torch.Tensor
    squared_output_WV: torch.Tensor
    element_query_HK: torch.Tensor
    element_key_HK: torch.Tensor
    element_value_WV: torch.Tensor
    element_output_WV: torch.Tensor

    @classmethod
    def zeros(cls, sizes: MixerSizes, device: torch.device) -> "TaylorSums":
        """Return sums over no row."""
        return cls(**_zeros([field.name for field in fields(cls)], sizes, device))

    def of(self, form: str, part: str) -> torch.Tensor:
        """Return the sums of one form ("signed", "squared", "element") for one projection.

        Args:
            form: which sums.
            part: "query" or "key" (``[H, K]``), "value" or "output" (``[W, V]``).
        """
        return getattr(self, f"{form}_{part}_{'HK' if part in ('query', 'key') else 'WV'}")


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
        value_gram_WVV: Gram matrix of v as the operator receives it.
        output_gram_WVV: Gram matrix of what the output projection receives, after norm and gate.
        output_energy_W: squared norm of what each value head adds to the mixer's output.
        taylor: what the loss says, where gradients were asked for.
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
    value_gram_WVV: torch.Tensor
    output_gram_WVV: torch.Tensor
    output_energy_W: torch.Tensor
    taylor: TaylorSums | None = None

    @classmethod
    def names(cls, *, gradients: bool) -> set[str]:
        """Return the names that :meth:`tensors` gives, with or without what gradients add."""
        own = {field.name for field in fields(cls) if field.name != "taylor"}
        return own | ({TAYLOR + field.name for field in fields(TaylorSums)} if gradients else set())

    @classmethod
    def zeros(cls, hidden: int, sizes: MixerSizes, device: torch.device) -> "LayerStatistics":
        """Return sums over no token."""
        return cls(**_zeros(cls.names(gradients=False), sizes, device, hidden))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "LayerStatistics":
        """Return the sums of which :meth:`tensors` is this."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(TAYLOR)}
        taylor = {name.removeprefix(TAYLOR): tensors[name] for name in tensors.keys() - own.keys()}
        return cls(**own, taylor=TaylorSums(**taylor) if taylor else None)

    @torch.no_grad()
    def add_input(self, hidden_BTD: torch.Tensor) -> None:
        """Add what one batch gives to the mixer."""
        self.input_square_D += hidden_BTD.double().square().sum(dim=(0, 1))

    @torch.no_grad()
    def add_operands(self, query_BTHK: torch.Tensor, key_BTHK: torch.Tensor, value_BTWV: torch.Tensor) -> None:
        """Add what one batch gives to the delta-rule operator.

        Queries and keys may also come once for each value head: transformers 5.21 gives them so, 5.23 does not.
        """
        for kind, operand_BTHK in (("query", query_BTHK), ("key", key_BTHK)):
            times = operand_BTHK.shape[2] // len(self.query_sum_HK)
            raw_HTK = _by_head(operand_BTHK[:, :, ::times])
            unit_HTK = raw_HTK * torch.rsqrt(raw_HTK.square().sum(dim=-1, keepdim=True) + _UNIT_EPS)
            for prefix, rows_HTK in ((kind, raw_HTK), (f"unit_{kind}", unit_HTK)):
                getattr(self, f"{prefix}_sum_HK").add_(rows_HTK.sum(dim=1))
                _add_gram(getattr(self, f"{prefix}_gram_HKK"), rows_HTK)
        _add_gram(self.value_gram_WVV, _by_head(value_BTWV))

    @torch.no_grad()
    def add_output(self, output_BTC: torch.Tensor) -> None:
        """Add what one batch gives to the output projection."""
        _add_gram(self.output_gram_WVV, _by_head(output_BTC.unflatten(-1, self.output_gram_WVV.shape[:2])))

    @torch.no_grad()
    def weigh_output(self, weight_DC: torch.Tensor) -> None:
        """Set ``output_energy_W`` of all that was added, from the output projection's weight.

        Head h adds ``W_h o_t`` to the output, and ``sum_t |W_h o_t|^2 = trace(W_h (sum_t o_t o_t^T) W_h^T)``.
        """
        weight_WDV = weight_DC.double().unflatten(1, self.output_gram_WVV.shape[:2]).transpose(0, 1)
        self.output_energy_W = (weight_WDV @ self.output_gram_WVV).mul_(weight_WDV).sum(dim=(1, 2))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return name -> sums, on the CPU; names of what gradients gave begin with ``taylor.``."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "taylor"}
        taylor = {} if self.taylor is None else {TAYLOR + name: sums for name, sums in vars(self.taylor).items()}
        return {name: sums.cpu() for name, sums in (own | taylor).items()}


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
                if not is_finite(tensor):
                    what = "gradients" if name.startswith(TAYLOR) else "activations"
                    raise KeyreduceError(
                        f"{what} of layer {layer} hold NaN or inf ({name.rsplit('_', 1)[0]}): "
                        f"the model is damaged, or its {what} overflow this dtype (try `dtype` float32)"
                    )


def _zeros(
    names: Iterable[str], sizes: MixerSizes, device: torch.device, hidden: int = 0
) -> dict[str, torch.Tensor]:
    """Name -> zeros of the shape that the name ends in."""
    size_of = dict(zip("HWKV", sizes, strict=True)) | {"D": hidden}
    shapes = {name: [size_of[axis] for axis in name.rsplit("_", 1)[1]] for name in names}
    return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}


def _by_head(operand_BTHK: torch.Tensor) -> torch.Tensor:
    """The rows of each head, ``[H, B * T, K]``, in float64."""
    return operand_BTHK.double().flatten(0, 1).transpose(0, 1)


def _add_gram(gram_HKK: torch.Tensor, rows_HTK: torch.Tensor) -> None:
    gram_HKK.baddbmm_(rows_HTK.mT, rows_HTK)

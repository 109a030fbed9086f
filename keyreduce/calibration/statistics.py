"""The statistics that calibration gathers: running sums for each layer, float64, whose size is independent of the text.

Shapes: B rows, T tokens, D hidden, H key heads, K key channels, W value heads, V value channels, C = W * V.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

import torch

from keyreduce.checkpoint.rewrite import is_finite
from keyreduce.errors import KeyreduceError
from keyreduce.families import MixerSizes
from keyreduce.versions import tested_versions

_UNIT_EPS = 1e-6
"""Added to the sum of squares, as fla and transformers do when they normalise q and k."""

TAYLOR = "taylor."
"""The prefix of the names of statistics that come from gradients."""
_NOT_KEPT = {"taylor", "input_moments_DE"}
"""Fields of :class:`LayerStatistics` that are no tensors of the file."""


@dataclass
class TaylorStatistics:
    """How the loss depends on the channels of one mixer's projections; every tensor is float64.

    With ``s_nc = sum_d W_cd dL_n/dW_cd`` for row n of the text and channel c of a projection, W its weight with one
    row for each channel (the output projection's transpose) and L_n the mean cross entropy of the row's next-token
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
    def zeros(cls, sizes: MixerSizes, device: torch.device) -> "TaylorStatistics":
        """Return statistics of no text."""
        return cls(**_zeros([field.name for field in fields(cls)], sizes, device))

    def of(self, form: str, part: str) -> torch.Tensor:
        """Return one form, "signed" and the like, for the query, key (``[H, K]``), value or output (``[W, V]``)."""
        return getattr(self, f"{form}_{part}_{'HK' if part in ('query', 'key') else 'WV'}")


@dataclass
class LayerStatistics:
    """Sums over the calibration tokens, for one mixer layer; every tensor is float64.

    "As the operator receives them" means after convolution and activation, before the L2 norm.

    Attributes:
        input_square_D: squares of the mixer's input, per hidden channel (its second moment, times the tokens).
        query_gram_HKK, key_gram_HKK: Gram matrices of q and k as the operator receives them, ``sum_t q_t q_t^T``.
        unit_query_gram_HKK, unit_key_gram_HKK: the same of q and k divided by their L2 norm.
        output_gram_WVV: Gram matrix of the output projection's input, after norm and gate.
        output_energy_W: squared norm of what each value head adds to the mixer's output.
        readout_square_WV: squares of the operator's output, per value channel, each token's divided by their mean over
            the head's channels: what the output norm makes of it before its weight.
        beta_W: the writing strengths; of a strength for each value channel their mean.
        state_rank_W, state_norm_W: stable rank and Frobenius norm of the state at the end of each row.
        constant_D: the direction u in which the mixer's input x is nearest to the constant 1, in the mean of
            ``(u x - 1)^2`` (:meth:`find_constant`).
        taylor: the statistics of gradients, if they were asked for.
        input_moments_DE: while calibration runs, the sums of ``x x^T`` and, in the last column, of ``x``. They are as
            wide as the model and do not go into the file.
    """

    input_square_D: torch.Tensor
    query_gram_HKK: torch.Tensor
    key_gram_HKK: torch.Tensor
    unit_query_gram_HKK: torch.Tensor
    unit_key_gram_HKK: torch.Tensor
    output_gram_WVV: torch.Tensor
    output_energy_W: torch.Tensor
    readout_square_WV: torch.Tensor
    beta_W: torch.Tensor
    state_rank_W: torch.Tensor
    state_norm_W: torch.Tensor
    constant_D: torch.Tensor
    taylor: TaylorStatistics | None = None
    input_moments_DE: torch.Tensor | None = None

    @classmethod
    def names(cls, *, gradients: bool) -> set[str]:
        """Return the names that :meth:`tensors` gives, with or without those of gradients."""
        own = {field.name for field in fields(cls) if field.name not in _NOT_KEPT}
        return own | ({TAYLOR + field.name for field in fields(TaylorStatistics)} if gradients else set())

    @classmethod
    def zeros(cls, hidden: int, sizes: MixerSizes, device: torch.device) -> "LayerStatistics":
        """Return statistics of no text."""
        tensors = _zeros(cls.names(gradients=False), sizes, device, hidden)
        moments_DE = torch.zeros(hidden, hidden + 1, dtype=torch.float64, device=device)
        return cls(**tensors, input_moments_DE=moments_DE)  # pyright: ignore  (there is no taylor among them)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "LayerStatistics":
        """Return the statistics for which :meth:`tensors` gives these tensors."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(TAYLOR)}
        statistics = cls(**own)  # pyright: ignore[reportArgumentType]  (own has no taylor)
        if taylor := {name.removeprefix(TAYLOR): tensors[name] for name in tensors.keys() - own.keys()}:
            statistics.taylor = TaylorStatistics(**taylor)
        return statistics

    @torch.no_grad()
    def add_input(self, hidden_BTD: torch.Tensor) -> None:
        """Add one batch of the mixer's input."""
        rows_ND = hidden_BTD.double().flatten(0, 1)
        self.input_square_D += rows_ND.square().sum(dim=0)
        assert self.input_moments_DE is not None  # statistics that were read from a file are complete
        self.input_moments_DE[:, :-1].addmm_(rows_ND.T, rows_ND)
        self.input_moments_DE[:, -1] += rows_ND.sum(dim=0)

    @torch.no_grad()
    def add_operands(self, query_BTHK: torch.Tensor, key_BTHK: torch.Tensor) -> None:
        """Add one batch of the delta-rule operator's arguments.

        Queries and keys may be repeated for each value head, as transformers 5.21 does and 5.23 does not.
        """
        for kind, operand_BTHK in (("query", query_BTHK), ("key", key_BTHK)):
            times = operand_BTHK.shape[2] // len(self.query_gram_HKK)
            raw_HTK = _by_head(operand_BTHK[:, :, ::times])
            unit_HTK = raw_HTK * torch.rsqrt(raw_HTK.square().sum(dim=-1, keepdim=True) + _UNIT_EPS)
            _add_gram(getattr(self, f"{kind}_gram_HKK"), raw_HTK)
            _add_gram(getattr(self, f"unit_{kind}_gram_HKK"), unit_HTK)

    @torch.no_grad()
    def add_readout(self, output_BTWV: torch.Tensor, beta: torch.Tensor | None, state_BWKV: torch.Tensor) -> None:
        """Add one batch of what the operator gives: its output, and the state at the end of each row.

        ``beta`` are the writing strengths that it was given, ``[B, T, W]`` or ``[B, T, W, V]``, if it was given any.
        """
        square_BTWV = output_BTWV.double().square()
        mean_BTW1 = square_BTWV.mean(dim=-1, keepdim=True)
        self.readout_square_WV += torch.where(mean_BTW1 > 0, square_BTWV / mean_BTW1, 0.0).sum(dim=(0, 1))
        if beta is not None:
            beta_BTG = beta.double().mean(dim=-1) if beta.ndim > 3 else beta.double()
            # Some operators take one for each key head.
            self.beta_W += beta_BTG.sum(dim=(0, 1)).repeat_interleave(len(self.beta_W) // beta_BTG.shape[2])
        self.state_rank_W += stable_rank(state_BWKV).sum(dim=0)
        self.state_norm_W += state_BWKV.double().square().sum(dim=(-2, -1)).sqrt().sum(dim=0)

    @torch.no_grad()
    def find_constant(self) -> None:
        """Compute ``constant_D`` from the sums of all rows, by ridge regression of 1 on the input, and let these go.

        The ridge is a hundredth of the input's mean square, which keeps directions that few rows have out of it.
        """
        assert self.input_moments_DE is not None
        gram_DD, sum_D = self.input_moments_DE[:, :-1], self.input_moments_DE[:, -1]
        ridge = 1e-2 * gram_DD.diagonal().mean()
        if ridge > 0:
            eye_DD = torch.eye(len(sum_D), dtype=gram_DD.dtype, device=gram_DD.device)
            self.constant_D = torch.linalg.solve(gram_DD + ridge * eye_DD, sum_D)
        self.input_moments_DE = None

    @torch.no_grad()
    def add_output(self, output_BTC: torch.Tensor) -> None:
        """Add one batch of the output projection's input."""
        _add_gram(self.output_gram_WVV, _by_head(output_BTC.unflatten(-1, self.output_gram_WVV.shape[:2])))

    @torch.no_grad()
    def weigh_output(self, weight_DC: torch.Tensor) -> None:
        """Compute ``output_energy_W`` from ``output_gram_WVV`` and the output projection's weight.

        Head h adds ``W_h o_t`` to the output, and ``sum_t |W_h o_t|^2 = trace(W_h (sum_t o_t o_t^T) W_h^T)``.
        """
        weight_WDV = weight_DC.double().unflatten(1, self.output_gram_WVV.shape[:2]).transpose(0, 1)
        self.output_energy_W = (weight_WDV @ self.output_gram_WVV).mul_(weight_WDV).sum(dim=(1, 2))

    def running(self) -> dict[str, torch.Tensor]:
        """Return name -> the tensors themselves to which batches are added, those of gradients included."""
        taylor = {} if self.taylor is None else {TAYLOR + name: tensor for name, tensor in vars(self.taylor).items()}
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, torch.Tensor)} | taylor

    def on_cpu(self) -> "LayerStatistics":
        """Return the same statistics on the CPU."""
        moved = LayerStatistics.of_tensors(self.tensors())
        moved.input_moments_DE = None if self.input_moments_DE is None else self.input_moments_DE.cpu()
        return moved

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return name -> tensor, on the CPU; the names of what comes from gradients begin with ``taylor.``."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _NOT_KEPT}
        taylor = {} if self.taylor is None else {TAYLOR + name: tensor for name, tensor in vars(self.taylor).items()}
        return {name: tensor.cpu() for name, tensor in (own | taylor).items()}


@dataclass
class Statistics:
    """The contents of a calibration file.

    Attributes:
        model: identity of the checkpoint that was calibrated (``Checkpoint.identity``).
        tokens: the number of calibration tokens.
        layers: layer number -> its statistics.
        inputs: what the statistics were made from, for the record: text, settings, versions.
    """

    model: str
    tokens: int
    layers: dict[int, LayerStatistics]
    inputs: dict

    def check_finite(self) -> None:
        """Raise KeyreduceError where statistics hold NaN or inf; it names the first of them and its layer."""
        for layer, statistics in self.layers.items():
            for name, tensor in statistics.tensors().items():
                if not is_finite(tensor):
                    what = "gradients" if name.startswith(TAYLOR) else "activations"
                    raise KeyreduceError(
                        f"{what} of layer {layer} hold NaN or inf ({name.rsplit('_', 1)[0]}): "
                        f"the model is damaged, or its {what} overflow this dtype (try `dtype` float32)"
                    )

    def check_seen(self) -> None:
        """Raise KeyreduceError where statistics are all zero, which say nothing: the mixer's operator was never seen.

        It names the first such layer.
        """
        for layer, statistics in self.layers.items():
            for what, tensor in {
                "inputs": statistics.input_square_D,
                "queries": statistics.query_gram_HKK,
                "keys": statistics.key_gram_HKK,
                "outputs": statistics.output_gram_WVV,
            }.items():
                if not tensor.any():
                    raise KeyreduceError(
                        f"the statistics of layer {layer} hold none of its {what}: its mixer made no call that is "
                        f"known here, or they are all zero; {tested_versions()}"
                    )


def _zeros(names: Iterable[str], sizes: MixerSizes, device: torch.device, hidden: int = 0) -> dict[str, torch.Tensor]:
    """Name -> zeros of the shape that the name ends in."""
    size_of = dict(zip("HWKV", sizes, strict=True)) | {"D": hidden}
    shapes = {name: [size_of[axis] for axis in name.rsplit("_", 1)[1]] for name in names}
    return {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes.items()}


def stable_rank(state_BWKV: torch.Tensor) -> torch.Tensor:
    """Return ``||S||_F^2 / ||S||_2^2`` of each state, in float64 ``[B, W]``; 0 of a state that is all zeros.

    Both norms come from the Gram matrix of the state's shorter side, whose largest eigenvalue is the squared spectral
    norm and whose trace is the squared Frobenius norm. A transposed state gives the same.
    """
    wide = state_BWKV.double()
    wide_BWMX = wide if wide.shape[-2] <= wide.shape[-1] else wide.mT
    gram_BWMM = wide_BWMX @ wide_BWMX.mT
    frobenius_BW = gram_BWMM.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.where(frobenius_BW > 0, frobenius_BW / _largest_eigenvalue(gram_BWMM), 0.0)


def _largest_eigenvalue(gram_BWMM: torch.Tensor) -> torch.Tensor:
    """Return the largest eigenvalue of each positive semidefinite matrix, ``[B, W]``.

    A GPU would take the decompositions of many small matrices one after another. There the power method takes their
    place: the mean of the eigenvalues, each weighted with its 1,024th power, is at most 0.02% too low.
    """
    if gram_BWMM.device.type == "cpu":
        return torch.linalg.eigvalsh(gram_BWMM)[..., -1]
    return _power_mean(gram_BWMM)


def _power_mean(gram_BWMM: torch.Tensor, doublings: int = 10) -> torch.Tensor:
    power_BWMM = gram_BWMM
    for _ in range(doublings):
        # The trace of a power lies between that of the largest eigenvalue alone and M times it, so nothing overflows.
        trace_BW11 = power_BWMM.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        power_BWMM = power_BWMM / trace_BW11.clamp(min=torch.finfo(trace_BW11.dtype).tiny)
        power_BWMM = power_BWMM @ power_BWMM
    weight_BW = power_BWMM.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (gram_BWMM * power_BWMM).sum((-2, -1)) / weight_BW.clamp(min=torch.finfo(weight_BW.dtype).tiny)


def _by_head(operand_BTHK: torch.Tensor) -> torch.Tensor:
    """The rows of each head, ``[H, B * T, K]``, in float64."""
    return operand_BTHK.double().flatten(0, 1).transpose(0, 1)


def _add_gram(gram_HKK: torch.Tensor, rows_HTK: torch.Tensor) -> None:
    gram_HKK.baddbmm_(rows_HTK.mT, rows_HTK)

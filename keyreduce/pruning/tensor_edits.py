"""The edits by which pruning changes one tensor, and what each leaves of it in the masked reference.

Shapes: H key heads, K key channels, V value channels, R kept, N length of an axis, P entries of a part of it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from keyreduce.checkpoint.rewrite import Edit


class MixerEdit(Edit):
    """An edit of a mixer's tensor, which also knows the tensor's counterpart in the masked reference.

    The masked reference is the dense model in which everything that was dropped is zero, and everything else holds the
    numbers of the pruned model, rounding included (:mod:`keyreduce.pruning.masked`).
    """

    def masked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of the masked reference: a new one of the shape and dtype of the dense ``tensor``.

        By default it is the edited tensor, for edits that leave the dense shape as it is.
        """
        return self.apply(tensor)


@dataclass(frozen=True)
class Select(MixerEdit):
    """Keep some entries of one axis, in the order of the index."""

    axis: int
    index_R: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape after the selection."""
        return (*shape[: self.axis], len(self.index_R), *shape[self.axis + 1 :])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor with the selected entries."""
        return tensor.index_select(self.axis, self.index_R)

    def masked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor itself: the masked reference drops channels at the delta-rule operator."""
        return tensor


@dataclass(frozen=True)
class Project(MixerEdit):
    """Replace the K query or key channels of each head along the first axis by R combinations of them.

    Attributes:
        matrix_HKR: the coefficients, of each head that stays.
        places: for each part of the axis, the places of the entries that stay in the dense tensor, the places of what
            becomes of them in the new one, and whether they are projected; if not, they are only moved.
    """

    matrix_HKR: torch.Tensor
    places: tuple[tuple[torch.Tensor, torch.Tensor, bool], ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape after the projection."""
        return (sum(len(new_P) for _, new_P, _ in self.places), *shape[1:])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same dtype, computed in float32 or better."""
        result = tensor.new_empty(self.shape(tuple(tensor.shape)))
        for old_P, new_P, is_projected in self.places:
            result[new_P] = self._projected(tensor[old_P]) if is_projected else tensor[old_P]
        return result

    def masked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor with the R combinations in the first channels of each head, and zeros in the others."""
        result, (heads, channels, rank) = tensor.clone(), self.matrix_HKR.shape
        for old_P, _, is_projected in self.places:
            if is_projected:
                result[old_P] = 0
                result[old_P.view(heads, channels)[:, :rank].flatten()] = self._projected(tensor[old_P])
        return result

    def _projected(self, rows: torch.Tensor) -> torch.Tensor:
        heads, channels, rank = self.matrix_HKR.shape
        wide = torch.promote_types(rows.dtype, torch.float32)
        rows_HKN = rows.to(wide).reshape(heads, channels, -1)
        return (self.matrix_HKR.to(wide).mT @ rows_HKN).reshape(heads * rank, *rows.shape[1:]).to(rows.dtype)


@dataclass(frozen=True)
class Scale(MixerEdit):
    """Multiply the entries along one axis by factors."""

    axis: int
    factor_N: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, which does not change."""
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same dtype, computed in float32 or better."""
        wide = torch.promote_types(tensor.dtype, torch.float32)
        factor = self.factor_N.to(wide).view(-1, *[1] * (tensor.ndim - self.axis - 1))
        return (tensor.to(wide) * factor).to(tensor.dtype)


@dataclass(frozen=True)
class Fill(MixerEdit):
    """Replace the weight of a norm by a shorter one whose entries are all the same number."""

    value: float
    length: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the new shape."""
        return (self.length,)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same dtype."""
        return torch.full((self.length,), self.value, dtype=tensor.dtype)

    def masked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``value * sqrt(R / V)`` for each of the V channels, float64, which is not to be rounded.

        The dense norm takes the mean square over V channels of which V - R are zero, and so gives more.
        """
        return torch.full(tensor.shape, self.value * (self.length / len(tensor)) ** 0.5, dtype=torch.float64)


@dataclass(frozen=True)
class Divide(MixerEdit):
    """Replace one of several tensors, which a model joins along their rows, by other rows of the joined tensor.

    Attributes:
        pieces: functions that return the tensors, in the order in which they are joined.
        begin, end: the range of rows of the joined tensor.
    """

    pieces: tuple[Callable[[], torch.Tensor], ...]
    begin: int
    end: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape with these rows."""
        return (self.end - self.begin, *shape[1:])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor with these rows."""
        return torch.cat([piece() for piece in self.pieces])[self.begin : self.end]


@dataclass(frozen=True)
class Narrow(MixerEdit):
    """Narrow the bottleneck of a product ``outer @ inner`` to rank R.

    The R largest singular values of the product, taken over the rows of ``outer`` that stay, are kept: no other product
    of rank R is closer in the Frobenius norm (Eckart and Young 1936). Each factor takes the square roots of the values.

    Attributes:
        rank: R.
        is_outer: whether the edited tensor is ``outer``, whose columns are the bottleneck; else it is ``inner``.
        other: returns the dense tensor of the other factor.
        rows_N: the rows of ``outer`` that stay. Where ``outer`` is edited, a `Select` comes first.
    """

    rank: int
    is_outer: bool
    other: Callable[[], torch.Tensor]
    rows_N: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape with R as the bottleneck's width."""
        return (shape[0], self.rank) if self.is_outer else (self.rank, shape[1])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same dtype, computed in float64; zeros pad a product whose rank is below R."""
        outer_NV, inner_VD = (tensor, self.other()) if self.is_outer else (self.other()[self.rows_N], tensor)
        # With triangular factors, the matrix to decompose is only as large as the bottleneck.
        left_NV, upper_VV = torch.linalg.qr(outer_NV.double())
        right_DV, other_upper_VV = torch.linalg.qr(inner_VD.double().T)
        u_VR, values_R, v_RV = torch.linalg.svd(upper_VV @ other_upper_VV.T, full_matrices=False)
        u_VR, values_R, v_RV = u_VR[:, : self.rank], values_R[: self.rank].sqrt(), v_RV[: self.rank]
        found = left_NV @ u_VR * values_R if self.is_outer else values_R[:, None] * (v_RV @ right_DV.T)
        result = tensor.new_zeros(self.shape(tuple(tensor.shape)))
        result[: found.shape[0], : found.shape[1]] = found
        return result

    def masked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the narrowed factor in the first R channels of the bottleneck, and zeros elsewhere."""
        result = torch.zeros_like(tensor)
        if self.is_outer:
            result[self.rows_N, : self.rank] = self.apply(tensor[self.rows_N])
        else:
            result[: self.rank] = self.apply(tensor)
        return result

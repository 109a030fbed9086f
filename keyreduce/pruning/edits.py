"""The edits by which pruning changes a tensor, and those that a cut and a family's table give for a layer's mixer.

Shapes: H key heads, W value heads, K key channels, V value channels, R kept, N entries of an axis, P of a part of it.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from keyreduce.checkpoint.rewrite import Edit
from keyreduce.families import Family, Part
from keyreduce.families.axes import Axis, kept_places, parts_of, place_of, places
from keyreduce.pruning.plan import LayerCut


class MixerEdit(Edit):
    """An edit of a mixer's tensor, which also knows the tensor's counterpart in the masked reference.

    The masked reference is the dense model in which everything that was dropped is zero, and everything else holds the
    numbers of the pruned model, rounding included (:mod:`keyreduce.pruning.masked`).
    """

    def masked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor of the masked reference: a new one of the shape and dtype of the dense ``tensor``."""
        return self.apply(tensor)  # for edits that leave the dense shape as it is


@dataclass(frozen=True)
class Select(MixerEdit):
    """Keep some entries of one axis, in the order of the index."""

    axis: int
    index_R: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[: self.axis], len(self.index_R), *shape[self.axis + 1 :])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(self.axis, self.index_R)

    def masked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor  # the masked reference drops channels at the delta-rule operator


@dataclass(frozen=True)
class Project(MixerEdit):
    """Replace the K query or key channels of each head along the first axis by R combinations, computed in float32.

    Attributes:
        matrix_HKR: the coefficients, of each head that stays.
        places: for each part of the axis, the places of the entries that stay in the dense tensor, the places of what
            becomes of them in the new one, and whether they are projected; if not, they are only moved.
    """

    matrix_HKR: torch.Tensor
    places: tuple[tuple[torch.Tensor, torch.Tensor, bool], ...]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (sum(len(new_P) for _, new_P, _ in self.places), *shape[1:])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
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
    """Multiply the entries along one axis by factors, in float32 or better."""

    axis: int
    factor_N: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        factor = self.factor_N.to(wide).view(-1, *[1] * (tensor.ndim - self.axis - 1))
        return (tensor.to(wide) * factor).to(tensor.dtype)


@dataclass(frozen=True)
class Fill(MixerEdit):
    """Replace the weight of a norm by a shorter one whose entries are all the same number."""

    value: float
    length: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.length,)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.full((self.length,), self.value, dtype=tensor.dtype)

    def masked(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return ``value * sqrt(R / V)`` for each of the V channels, float64, which is not to be rounded.

        The dense norm takes the mean square over V channels of which V - R are zero, and so gives more.
        """
        return torch.full(tensor.shape, self.value * (self.length / len(tensor)) ** 0.5, dtype=torch.float64)


@dataclass(frozen=True)
class Shift(MixerEdit):
    """Add multiples of one vector to some rows, in float32 or better.

    Attributes:
        rows_P: the rows.
        factor_P: the multiple of each.
        vector_D: the vector.
    """

    rows_P: torch.Tensor
    factor_P: torch.Tensor
    vector_D: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(tensor.dtype, torch.float32)
        result = tensor.to(wide, copy=True)
        result[self.rows_P] += (self.factor_P[:, None] * self.vector_D).to(wide)
        return result.to(tensor.dtype)


@dataclass(frozen=True)
class Absorb(MixerEdit):
    """Replace some columns of each head by combinations of all its columns, in float32.

    Attributes:
        heads_W: the heads.
        kept_WR: the columns of each head that are replaced.
        columns_WVR: how they are made of its V columns.
    """

    heads_W: torch.Tensor
    kept_WR: torch.Tensor
    columns_WVR: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        wide, channels = torch.promote_types(tensor.dtype, torch.float32), self.columns_WVR.shape[1]
        result_DWV = tensor.clone().unflatten(1, (-1, channels))
        for head, kept_R, columns_VR in zip(self.heads_W, self.kept_WR, self.columns_WVR, strict=True):
            result_DWV[:, head, kept_R] = (result_DWV[:, head].to(wide) @ columns_VR.to(wide)).to(tensor.dtype)
        return result_DWV.flatten(1)


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
        return (self.end - self.begin, *shape[1:])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([piece() for piece in self.pieces])[self.begin : self.end]


@dataclass(frozen=True)
class Narrow(MixerEdit):
    """Narrow the bottleneck of a product ``outer @ inner`` to rank R, in float64; zeros pad one whose rank is below R.

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
        return (shape[0], self.rank) if self.is_outer else (self.rank, shape[1])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
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


_PROJECTED = {Part.QUERY, Part.KEY}
_RANKS = {Part.DECAY_RANK: Part.DECAY, Part.GATE_RANK: Part.GATE}
"""Bottleneck -> the channels that are reached through it."""


def layer_edits(
    family: Family,
    layer: int,
    cut: LayerCut,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> dict[str, list[MixerEdit]]:
    """Return tensor name -> the edits, in order, that make one layer's mixer what a cut says, where a tensor changes.

    Where value channels are dropped, the output norm needs care: all heads share its weight, and it divides by the root
    mean square over the channels that are left. So its weight is folded into the columns of the output projection,
    where each head can keep channels of its own, together with ``sqrt(V / R)``, since the mean is now over R channels
    instead of V, of which the others were zero; the norm's weight becomes one. That is exact, up to the norm's eps and
    the rounding of the projection to its dtype, also with an output gate. A bottleneck as wide as a head's values is
    narrowed with them, which is not exact. A correction changes the factors of the heads, and the rows that give the
    writing strength.

    Args:
        shapes: tensor name -> shape, of the whole checkpoint; a model need not have every tensor of its table.
        read: returns a tensor by its name. It is called for the norm's weight here, and for the tensors that other
            edits need when those are applied.
    """
    mixer = _Mixer(family, layer, cut, shapes, read)
    names = {family.tensor_name(layer, name): name for name in family.tensors}
    edits = {full: mixer.edits(name) for full, name in names.items() if full in shapes}
    return {name: changes for name, changes in edits.items() if changes}


@dataclass(frozen=True)
class _Mixer:
    family: Family
    layer: int
    cut: LayerCut
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]

    def edits(self, name: str) -> list[MixerEdit]:
        edits, shape = self._division(name), self.shapes[self.family.tensor_name(self.layer, name)]
        shape = edits[0].shape(shape) if edits else shape
        for axis, length in enumerate(shape):
            edits += self._axis_edits(name, axis, length)
        return edits

    def _division(self, name: str) -> list[MixerEdit]:
        """The edit that gives a tensor that the model joins with others its own rows, where the file has others."""
        found, wanted = self.family.divided(self.layer, name, self.shapes, self.cut.before.lengths)
        if found == wanted:
            return []
        pieces = self.family.joined_with(name)
        ends, place = list(itertools.accumulate(wanted)), pieces.index(name)
        readers = tuple(partial(self.read, self.family.tensor_name(self.layer, piece)) for piece in pieces)
        return [Divide(readers, ends[place] - wanted[place], ends[place])]

    def _axis_edits(self, name: str, axis: int, length: int) -> list[MixerEdit]:
        axes = self.family.tensors[name]
        part, parts = axes[axis], set(parts_of(axes[axis]))
        if part is Part.SHARED_VALUE or part in _RANKS:
            return [] if self._all_values else [self._value_edit(part, axis)]
        if (matrix_HKR := self.cut.projection_HKR) is not None and not _PROJECTED.isdisjoint(parts):
            return [self._projection(axes, matrix_HKR)]
        if not parts <= self._kept.keys() or (part is Part.HEAD_OR_ALL and length == 1):
            return []
        index = kept_places(part, self._kept, *self._layouts)
        selection = [] if _is_whole(index, length) else [Select(axis, index)]
        first = self._fold(axis) if part is Part.VALUE and axis > 0 else []
        first += self._shift(axes) if Part.BETA in parts else []
        return first + selection

    def _shift(self, axes: tuple[Axis, ...]) -> list[MixerEdit]:
        """The edit that changes the writing strength, where a correction does."""
        correction = self.cut.correction
        if correction is None or axes[1:] != (Part.HIDDEN,) or not correction.beta_shift_W.any():
            return []
        found = place_of(axes[0], Part.BETA, *self._layouts[0])
        rows_W = self.cut.value_heads_W if found is None else found[self.cut.value_heads_W]
        return [Shift(rows_W, correction.beta_shift_W, correction.constant_D)]

    def _value_edit(self, part: Part, axis: int) -> MixerEdit:
        """The edit of an axis as long as a head's values, from which channels are dropped."""
        rank = self.cut.after.head_v_dim
        if part is Part.SHARED_VALUE:
            return Fill(1.0, rank)
        tensors = self.family.tensors
        (inner,) = (name for name, axes in tensors.items() if axes[0] is part)
        (outer,) = (name for name, axes in tensors.items() if axes[1:] == (part,))
        other = self.family.tensor_name(self.layer, inner if axis == 1 else outer)
        return Narrow(rank, is_outer=axis == 1, other=partial(self.read, other), rows_N=self._kept[_RANKS[part]])

    def _fold(self, axis: int) -> list[MixerEdit]:
        """The edit that folds the output norm's weight into the tensor that comes after it, if there is one."""
        norms = [name for name, axes in self.family.tensors.items() if Part.SHARED_VALUE in axes]
        names = [self.family.tensor_name(self.layer, name) for name in norms]
        norm = next((name for name in names if name in self.shapes), None)
        if norm is None or self._all_values:
            return []
        before, after = self.cut.before, self.cut.after
        weight_V = self.read(norm).double() * (before.head_v_dim / after.head_v_dim) ** 0.5
        weight_WV, correction = weight_V.repeat(before.value_heads, 1), self.cut.correction
        if correction is None:
            return [Scale(axis, weight_WV.flatten())]
        heads_W = self.cut.value_heads_W
        weight_WV[heads_W] *= correction.value_scale_W[:, None]
        return [Absorb(heads_W, self.cut.value_WR, correction.columns_WVR), Scale(axis, weight_WV.flatten())]

    def _projection(self, axes: tuple[Axis, ...], matrix_HKR: torch.Tensor) -> Project:
        if Part.OTHER in axes:
            # Convolution kernels do not add up as channels do: a combined channel has their weighted mean.
            matrix_HKR = matrix_HKR.square()
        before, after = (places(axes[0], *layout) for layout in self._layouts)
        moves = [
            (old_P[self._kept[part]], new_P, part in _PROJECTED)
            for (part, old_P), (_, new_P) in zip(before, after, strict=True)
        ]
        return Project(matrix_HKR, tuple(moves))

    @property
    def _layouts(self) -> list[tuple[Mapping[Part, int], int]]:
        # The lengths of the parts and the number of key heads, before and after.
        return [(sizes.lengths, sizes.key_heads) for sizes in (self.cut.before, self.cut.after)]

    @property
    def _all_values(self) -> bool:
        return _is_whole(self.cut.value_WR, self.cut.before.head_v_dim)

    @cached_property
    def _kept(self) -> dict[Part, torch.Tensor]:
        """The entries that stay of each part, in order; all channels of the heads that stay, if they are projected."""
        cut, before, value_heads_W = self.cut, self.cut.before, self.cut.value_heads_W
        key_HR = torch.arange(before.head_k_dim).expand(len(cut.heads_H), -1) if cut.key_HR is None else cut.key_HR
        key = (cut.heads_H[:, None] * before.head_k_dim + key_HR).flatten()
        value = (value_heads_W[:, None] * before.head_v_dim + cut.value_WR).flatten()
        decay_WR = key_HR.repeat_interleave(before.value_heads // before.key_heads, dim=0)
        return {
            Part.QUERY: key,
            Part.KEY: key,
            Part.VALUE: value,
            Part.GATE: value,
            Part.DECAY: (value_heads_W[:, None] * before.head_k_dim + decay_WR).flatten(),
            Part.KEY_HEAD: cut.heads_H,
            Part.VALUE_HEAD: value_heads_W,
            Part.BETA: value_heads_W,
            Part.HEAD_OR_ALL: cut.heads_H,
        }


def _is_whole(index_R: torch.Tensor, length: int) -> bool:
    return index_R.shape[-1] == length and bool((index_R == torch.arange(length)).all())

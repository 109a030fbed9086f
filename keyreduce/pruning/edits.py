"""The changes that pruning makes to a tensor, and how a cut and a family's table give them for a whole layer.

Shapes: H key heads, W value heads, K key channels, V value channels, R kept, N length of an axis.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from keyreduce.checkpoint.rewrite import Edit
from keyreduce.families import Family, MixerSizes, Part
from keyreduce.families.axes import parts_of
from keyreduce.families.layout import kept_places, places
from keyreduce.pruning.plan import LayerCut

_PROJECTED = {Part.QUERY, Part.KEY}
_RANKS = {Part.DECAY_RANK: Part.DECAY, Part.GATE_RANK: Part.GATE}
"""What reaches its channels through a bottleneck -> these channels."""


@dataclass(frozen=True)
class Select:
    """Keep some entries of one axis, in the order given."""

    axis: int
    index_R: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape after the selection."""
        return (*shape[: self.axis], len(self.index_R), *shape[self.axis + 1 :])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor with the selected entries."""
        return tensor.index_select(self.axis, self.index_R)


@dataclass(frozen=True)
class Project:
    """Replace the K channels of each head along the first axis by R combinations of them.

    Attributes:
        matrix_HKR: the coefficients; the first axis of the tensor is H x K long, if there is nothing else on it.
        places: where there is: for each part of the axis the places of its entries before and after, and whether it
            is one that is projected.
    """

    matrix_HKR: torch.Tensor
    places: tuple[tuple[torch.Tensor, torch.Tensor, bool], ...] = ()

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape after the projection."""
        heads, _, rank = self.matrix_HKR.shape
        return (sum(len(new_P) for _, new_P, _ in self.places) or heads * rank, *shape[1:])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same dtype, computed in float32 or better."""
        if not self.places:
            return self._mixed(tensor)
        result = tensor.new_empty(self.shape(tuple(tensor.shape)))
        for old_P, new_P, is_mixed in self.places:
            result[new_P] = self._mixed(tensor[old_P]) if is_mixed else tensor[old_P]
        return result

    def _mixed(self, rows: torch.Tensor) -> torch.Tensor:
        heads, channels, rank = self.matrix_HKR.shape
        wide = torch.promote_types(rows.dtype, torch.float32)
        rows_HKN = rows.to(wide).reshape(heads, channels, -1)
        return (self.matrix_HKR.to(wide).mT @ rows_HKN).reshape(heads * rank, *rows.shape[1:]).to(rows.dtype)


@dataclass(frozen=True)
class Scale:
    """Multiply the entries along one axis."""

    axis: int
    factor_N: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, which stays."""
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same dtype, computed in float32 or better."""
        wide = torch.promote_types(tensor.dtype, torch.float32)
        factor = self.factor_N.to(wide).view(-1, *[1] * (tensor.ndim - self.axis - 1))
        return (tensor.to(wide) * factor).to(tensor.dtype)


@dataclass(frozen=True)
class Fill:
    """Let all entries be one number, and the only axis have a new length."""

    value: float
    length: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the new shape."""
        return (self.length,)

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same dtype."""
        return torch.full((self.length,), self.value, dtype=tensor.dtype)


@dataclass(frozen=True)
class Divide:
    """Be another piece of a tensor that is in pieces: some of the rows of all of them, one after another.

    Attributes:
        pieces: give the pieces in order.
        begin, end: the rows.
    """

    pieces: tuple[Callable[[], torch.Tensor], ...]
    begin: int
    end: int

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape with these rows."""
        return (self.end - self.begin, *shape[1:])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of these rows."""
        return torch.cat([piece() for piece in self.pieces])[self.begin : self.end]


@dataclass(frozen=True)
class Narrow:
    """Narrow a bottleneck ``outer @ inner`` to the best product of a lower rank.

    Of a singular value decomposition of the product, with the rows of ``outer`` that stay, the R largest values stay:
    no product of rank R is nearer in the Frobenius norm (Eckart and Young 1936). Each factor takes their square roots.

    Attributes:
        rank: R.
        is_outer: whether the tensor is the one whose columns are the bottleneck, or the one whose rows are.
        other: gives the other one, whole.
        rows_N: the rows of ``outer`` that stay; of the tensor itself, if it is that one, they were selected before.
    """

    rank: int
    is_outer: bool
    other: Callable[[], torch.Tensor]
    rows_N: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape with R in the place of the bottleneck's width."""
        return (shape[0], self.rank) if self.is_outer else (self.rank, shape[1])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of the same dtype, computed in float64."""
        outer_NV, inner_VD = (tensor, self.other()) if self.is_outer else (self.other()[self.rows_N], tensor)
        # Through triangular factors the decomposition is of a matrix of the bottleneck's size.
        left_NV, upper_VV = torch.linalg.qr(outer_NV.double())
        right_DV, other_upper_VV = torch.linalg.qr(inner_VD.double().T)
        u_VR, values_R, v_RV = torch.linalg.svd(upper_VV @ other_upper_VV.T, full_matrices=False)
        u_VR, values_R, v_RV = u_VR[:, : self.rank], values_R[: self.rank].sqrt(), v_RV[: self.rank]
        result = left_NV @ u_VR * values_R if self.is_outer else values_R[:, None] * (v_RV @ right_DV.T)
        return self._filled(result).to(tensor.dtype)

    def _filled(self, result: torch.Tensor) -> torch.Tensor:
        """The result with zeros where a product of few rows or columns has a lower rank than asked for."""
        missing = self.rank - result.shape[1 if self.is_outer else 0]
        return torch.nn.functional.pad(result, (0, missing) if self.is_outer else (0, 0, 0, missing))


def layer_edits(
    family: Family,
    layer: int,
    cut: LayerCut,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> dict[str, list[Edit]]:
    """Return the edits that leave of one layer's mixer what a cut says; what stays whole gets none.

    Where value channels go, the output norm needs care: all heads share its weight, and it divides by the root mean
    square over the channels that are left. So the weight is folded into the columns of the output projection, where
    each head can keep channels of its own, and with it ``sqrt(V / R)``, since the mean is now over R channels instead
    of V, of which the others were zero; the norm's weight becomes one. That is exact, up to the norm's eps and the
    rounding of the projection to its dtype, also with an output gate. A bottleneck that is as wide as a head's values
    is narrowed with them, which is no longer exact.

    Args:
        family: its table says what each axis of each tensor holds.
        layer: the layer's number.
        cut: what stays of it.
        shapes: tensor name -> shape, of the whole checkpoint; a model does not have all that its table lists.
        read: gives a tensor by its name; asked for the norm's weight, and for bottlenecks when their edits are made.
    """
    kept = _kept_entries(cut)
    before = cut.before.lengths, cut.before.key_heads
    # A projection comes after the choice of heads, and finds their channels whole.
    middle = cut.after if cut.projection_HKR is None else cut.after._replace(head_k_dim=cut.before.head_k_dim)
    middle, after = (middle.lengths, middle.key_heads), (cut.after.lengths, cut.after.key_heads)
    all_values = _is_whole(cut.value_WR, cut.before.head_v_dim)
    norm = None if all_values else _norm_weight(family, layer, shapes)
    edits: dict[str, list[Edit]] = {}
    for short_name, axes in family.tensors.items():
        name = family.tensor_name(layer, short_name)
        if name not in shapes:
            continue
        changes: list[Edit] = _divided_anew(family, layer, short_name, cut.before, shapes, read)
        shape = changes[0].shape(shapes[name]) if changes else shapes[name]
        for axis, part in enumerate(axes):
            parts, length = parts_of(part), shape[axis]
            if part is Part.VALUE and axis > 0 and norm is not None:
                weight_V = read(norm).double() * (cut.before.head_v_dim / cut.after.head_v_dim) ** 0.5
                changes.append(Scale(axis, weight_V.repeat(cut.before.value_heads)))
            if part is Part.SHARED_VALUE and norm is not None:
                changes.append(Fill(1.0, cut.after.head_v_dim))
            stands_for_all = part is Part.HEAD_OR_ALL and length == 1
            if kept.keys() >= set(parts) and not stands_for_all:
                index = kept_places(part, kept, before, middle)
                if not _is_whole(index, length):
                    changes.append(Select(axis, index))
            if part in _RANKS and not all_values:
                inner, outer = (family.tensor_name(layer, found) for found in _bottleneck(family, part))
                changes.append(
                    Narrow(
                        cut.after.head_v_dim,
                        is_outer=axis == 1,
                        other=partial(read, inner if axis == 1 else outer),
                        rows_N=kept[_RANKS[part]],
                    )
                )
            if cut.projection_HKR is not None and not _PROJECTED.isdisjoint(parts):
                # A kernel is no vector of channels: of two mixed channels it is the weighted mean.
                matrix_HKR = cut.projection_HKR.square() if Part.OTHER in axes else cut.projection_HKR
                moves = [
                    (old_P, new_P, which in _PROJECTED)
                    for (which, old_P), (_, new_P) in zip(places(part, *middle), places(part, *after), strict=True)
                ]
                changes.append(Project(matrix_HKR, tuple(moves) if len(parts) > 1 else ()))
        if changes:
            edits[name] = changes
    return edits


def _divided_anew(
    family: Family,
    layer: int,
    name: str,
    sizes: MixerSizes,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> list[Edit]:
    """What gives a piece of a joined tensor its own rows, where they are divided otherwise."""
    found, wanted = family.divided(layer, name, shapes, sizes.lengths)
    if found == wanted:
        return []
    pieces = family.joined_with(name)
    ends, place = list(itertools.accumulate(wanted)), pieces.index(name)
    readers = tuple(partial(read, family.tensor_name(layer, piece)) for piece in pieces)
    return [Divide(readers, ends[place] - wanted[place], ends[place])]


def _kept_entries(cut: LayerCut) -> dict[Part, torch.Tensor]:
    """What stays of an axis that holds a part, in order."""
    value_heads_W, channels = cut.value_heads_W, torch.arange(cut.before.head_k_dim)
    key_HR = channels.expand(len(cut.heads_H), -1) if cut.key_HR is None else cut.key_HR
    key = (cut.heads_H[:, None] * cut.before.head_k_dim + key_HR).flatten()
    value = (value_heads_W[:, None] * cut.before.head_v_dim + cut.value_WR).flatten()
    group = cut.before.value_heads // cut.before.key_heads
    decay = (value_heads_W[:, None] * cut.before.head_k_dim + key_HR.repeat_interleave(group, dim=0)).flatten()
    return {
        Part.QUERY: key,
        Part.KEY: key,
        Part.VALUE: value,
        Part.GATE: value,
        Part.DECAY: decay,
        Part.VALUE_HEAD: value_heads_W,
        Part.HEAD_OR_ALL: cut.heads_H,
    }


def _is_whole(index_R: torch.Tensor, length: int) -> bool:
    return index_R.shape[-1] == length and bool((index_R == torch.arange(length)).all())


def _bottleneck(family: Family, part: Part) -> tuple[str, str]:
    """The names of the weights before and after a bottleneck."""
    (inner,) = (name for name, axes in family.tensors.items() if axes[0] is part)
    (outer,) = (name for name, axes in family.tensors.items() if axes[1:] == (part,))
    return inner, outer


def _norm_weight(family: Family, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    names = [family.tensor_name(layer, name) for name, axes in family.tensors.items() if Part.SHARED_VALUE in axes]
    return next((name for name in names if name in shapes), None)

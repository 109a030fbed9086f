"""The edits that a cut and a family's table give for a layer's mixer.

Shapes: H key heads, W value heads, K key channels, V value channels, R kept, P entries of a part of an axis.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from keyreduce.checkpoint.rewrite import Edit
from keyreduce.families import Family, Part
from keyreduce.families.axes import Axis, parts_of
from keyreduce.families.layout import kept_places, places
from keyreduce.pruning.plan import LayerCut
from keyreduce.pruning.tensor_edits import Divide, Fill, Narrow, Project, Scale, Select

_PROJECTED = {Part.QUERY, Part.KEY}
_RANKS = {Part.DECAY_RANK: Part.DECAY, Part.GATE_RANK: Part.GATE}
"""Bottleneck -> the channels that are reached through it."""


def layer_edits(
    family: Family,
    layer: int,
    cut: LayerCut,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
) -> dict[str, list[Edit]]:
    """Return the edits that make one layer's mixer what a cut says: tensor name -> `MixerEdit`, in order.

    Tensors that do not change have no entry.

    Where value channels are dropped, the output norm needs care: all heads share its weight, and it divides by the root
    mean square over the channels that are left. So its weight is folded into the columns of the output projection,
    where each head can keep channels of its own, together with ``sqrt(V / R)``, since the mean is now over R channels
    instead of V, of which the others were zero; the norm's weight becomes one. That is exact, up to the norm's eps and
    the rounding of the projection to its dtype, also with an output gate. A bottleneck as wide as a head's values is
    narrowed with them, which is not exact.

    Args:
        family: its table says what each axis of each tensor holds.
        layer: the layer's number.
        cut: what stays of it.
        shapes: tensor name -> shape, of the whole checkpoint; a model need not have every tensor of its table.
        read: returns a tensor by its name. It is called for the norm's weight here, and for the tensors that other
            edits need when those are applied.
    """
    mixer = _Mixer(family, layer, cut, shapes, read)
    edits = {
        family.tensor_name(layer, name): mixer.edits(name)
        for name in family.tensors
        if family.tensor_name(layer, name) in shapes
    }
    return {name: changes for name, changes in edits.items() if changes}


@dataclass(frozen=True)
class _Mixer:
    """The arguments of :func:`layer_edits`."""

    family: Family
    layer: int
    cut: LayerCut
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]

    def edits(self, name: str) -> list[Edit]:
        """The edits of one tensor, by its name below the mixer."""
        edits: list[Edit] = self._division(name)
        shape = self.shapes[self.family.tensor_name(self.layer, name)]
        shape = edits[0].shape(shape) if edits else shape
        for axis, length in enumerate(shape):
            edits += self._axis_edits(name, axis, length)
        return edits

    def _division(self, name: str) -> list[Edit]:
        """The edit that gives a tensor that the model joins with others its own rows, where the file has others."""
        found, wanted = self.family.divided(self.layer, name, self.shapes, self.cut.before.lengths)
        if found == wanted:
            return []
        pieces = self.family.joined_with(name)
        ends, place = list(itertools.accumulate(wanted)), pieces.index(name)
        readers = tuple(partial(self.read, self.family.tensor_name(self.layer, piece)) for piece in pieces)
        return [Divide(readers, ends[place] - wanted[place], ends[place])]

    def _axis_edits(self, name: str, axis: int, length: int) -> list[Edit]:
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
        return (self._fold(axis) if part is Part.VALUE and axis > 0 else []) + selection

    def _value_edit(self, part: Part, axis: int) -> Edit:
        """The edit of an axis as long as a head's values, from which channels are dropped."""
        rank = self.cut.after.head_v_dim
        if part is Part.SHARED_VALUE:
            return Fill(1.0, rank)
        tensors = self.family.tensors
        (inner,) = (name for name, axes in tensors.items() if axes[0] is part)
        (outer,) = (name for name, axes in tensors.items() if axes[1:] == (part,))
        other = self.family.tensor_name(self.layer, inner if axis == 1 else outer)
        return Narrow(rank, is_outer=axis == 1, other=partial(self.read, other), rows_N=self._kept[_RANKS[part]])

    def _fold(self, axis: int) -> list[Edit]:
        """The edit that folds the output norm's weight into the tensor that comes after it, if there is one."""
        norms = [name for name, axes in self.family.tensors.items() if Part.SHARED_VALUE in axes]
        names = [self.family.tensor_name(self.layer, name) for name in norms]
        norm = next((name for name in names if name in self.shapes), None)
        if norm is None or self._all_values:
            return []
        before, after = self.cut.before, self.cut.after
        weight_V = self.read(norm).double() * (before.head_v_dim / after.head_v_dim) ** 0.5
        return [Scale(axis, weight_V.repeat(before.value_heads))]

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
        """The lengths of the parts and the number of key heads, before and after."""
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
            Part.VALUE_HEAD: value_heads_W,
            Part.HEAD_OR_ALL: cut.heads_H,
        }


def _is_whole(index_R: torch.Tensor, length: int) -> bool:
    return index_R.shape[-1] == length and bool((index_R == torch.arange(length)).all())

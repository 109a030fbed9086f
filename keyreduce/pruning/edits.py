"""The changes that pruning makes to a tensor, and how a plan and a family's table give them for a whole checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from keyreduce.families import Family, MixerSizes, Part


@dataclass(frozen=True)
class Select:
    """Keep some entries of one axis, in the order given.

    Attributes:
        axis: which axis.
        index: the entries that stay.
    """

    axis: int
    index: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape after the selection."""
        return (*shape[: self.axis], len(self.index), *shape[self.axis + 1 :])

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a new tensor with the selected entries."""
        return tensor.index_select(self.axis, self.index)


def key_channel_edits(
    family: Family, sizes: MixerSizes, kept: Mapping[int, torch.Tensor], names: Sequence[str]
) -> dict[str, list[Select]]:
    """Return the edits that leave only the kept key channels of each layer.

    Args:
        family: its table says which axis of which tensor holds query and key channels.
        sizes: the sizes before the cut.
        kept: layer -> kept channels of each key head, LongTensor ``[H, R]``.
        names: the tensors of the checkpoint; a model does not have all that its table lists.
    """
    present, edits = set(names), {}
    for layer, kept_HR in kept.items():
        first_H1 = torch.arange(sizes.key_heads)[:, None] * sizes.head_k_dim
        index = (first_H1 + kept_HR).flatten()
        for short_name, parts in family.tensors.items():
            name = family.tensor_name(layer, short_name)
            selects = [Select(axis, index) for axis, part in enumerate(parts) if part in (Part.QUERY, Part.KEY)]
            if selects and name in present:
                edits[name] = selects
    return edits

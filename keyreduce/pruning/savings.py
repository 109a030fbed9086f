"""How much smaller pruning made a model, from the headers of both checkpoints."""

from typing import NamedTuple

import torch

from keyreduce.checkpoint.source import Checkpoint
from keyreduce.families import family_of


class Savings(NamedTuple):
    """Pairs of before and after: bytes of the recurrent state of a sequence in float32, and numbers of parameters."""

    state_bytes_per_sequence: tuple[int, int]
    mixer_parameters: tuple[int, int]
    model_parameters: tuple[int, int]

    @property
    def sentence(self) -> str:
        """A sentence that says how much smaller the state and the model became."""
        state, mixer, model = (f"{100 * (1 - after / before):.1f}%" for before, after in self)
        before, after = (f"{size / 2**20:,.2f}" for size in self.state_bytes_per_sequence)
        return (
            f"the state of a sequence is {state} smaller ({before} to {after} MiB in float32), "
            f"the mixers are {mixer} smaller, the whole model {model}"
        )


def savings(source: Checkpoint, pruned: Checkpoint) -> Savings:
    """Return what was saved between a checkpoint and the one that was pruned from it."""
    before, after = _counts(source), _counts(pruned)
    return Savings(*zip(before, after, strict=True))


def _counts(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """The bytes of state of a sequence, the parameters of the mixers, and those of the model."""
    family = family_of(checkpoint.config, checkpoint.tensors)
    mixers = tuple(family.tensor_name(layer, "") for layer in family.mixer_layers(checkpoint.config))
    counts = {name: torch.Size(spec.shape).numel() for name, spec in checkpoint.tensors.items()}
    in_mixers = sum(count for name, count in counts.items() if name.startswith(mixers))
    return family.state_bytes(checkpoint.config), in_mixers, sum(counts.values())

"""What a cut saves, from the headers of a checkpoint alone."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from keyreduce.checkpoint.rewrite import Edit
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.families import family_of
from keyreduce.pruning.plan import Plan


class Savings(NamedTuple):
    """Before and after: bytes of recurrent state that a sequence holds in float32, and numbers of parameters."""

    state_bytes_per_sequence: tuple[int, int]
    mixer_parameters: tuple[int, int]
    model_parameters: tuple[int, int]

    @property
    def sentence(self) -> str:
        """How much smaller everything became, for people."""
        state, mixer, model = (f"{100 * (1 - after / before):.1f}%" for before, after in self)
        before, after = (f"{size / 2**20:,.2f}" for size in self.state_bytes_per_sequence)
        return (
            f"the state of a sequence is {state} smaller ({before} to {after} MiB in float32), "
            f"the mixers are {mixer} smaller, the whole model {model}"
        )


def savings(source: Checkpoint, plan: Plan, edits: Mapping[str, Sequence[Edit]]) -> Savings:
    """Return what a plan saves.

    Args:
        source: the checkpoint that is pruned.
        plan: what stays.
        edits: the plan's edits.
    """
    family = family_of(source.config, source.tensors)
    prefixes = tuple(family.tensor_name(layer, "") for layer in plan.layers)
    mixer, model = [0, 0], [0, 0]
    for name, spec in source.tensors.items():
        shape = spec.shape
        for edit in edits.get(name, ()):
            shape = edit.shape(shape)
        for counts in (model, mixer) if name.startswith(prefixes) else (model,):
            counts[0] += torch.Size(spec.shape).numel()
            counts[1] += torch.Size(shape).numel()
    state = [4 * sum(sizes.state_elements for sizes in layers.values()) for layers in (plan.before, plan.after)]
    return Savings(tuple(state), tuple(mixer), tuple(model))

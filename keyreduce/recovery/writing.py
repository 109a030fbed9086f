"""A recovered checkpoint and its record, written whole or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from keyreduce.checkpoint.card import read_card, write_record
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.record import Record
from keyreduce.checkpoint.rewrite import Edit, rewrite
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.families import family_of
from keyreduce.outputs import appearing
from keyreduce.recovery.layers import Recovered
from keyreduce.recovery.modes import MODES, TRAINING_MODES


@dataclass(frozen=True)
class Replace(Edit):
    """Put other numbers into a tensor, whose shape stays."""

    tensor: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.tensor


def write_recovered(
    pruned: Checkpoint,
    recovered: Recovered,
    target: Path,
    *,
    inputs: Mapping,
    seconds: float,
    command: str | None = None,
    overwrite: bool = False,
    figures: Mapping | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write the pruned checkpoint with the tensors that recovery changed.

    ``keyreduce.json`` gets an entry in ``repairs``: what the recovery was made from, after how many pruning steps, and
    its figures. The model card is made from it.

    Args:
        inputs: what the recovery was made from; equal inputs give an equal result, up to rounding.
        seconds: how long it took.
        command: the command line that asked for it.
        figures: other figures for the record.
        finish: called with the folder before it appears, to add files to it.

    Raises:
        KeyreduceError: see :func:`keyreduce.checkpoint.rewrite.rewrite`; or the target exists.
    """
    made = {"tokens": recovered.tokens, "seconds": seconds}
    if recovered.layers:
        made["layers"] = {str(layer): one for layer, one in recovered.layers.items()}
    record = Record.read(pruned.path).with_recovery(
        inputs,
        {**made, **(figures or {})},
        summary=(MODES | TRAINING_MODES).get(inputs["mode"], ""),
        shipped_by=family_of(pruned.config).shipped_by,
        command=command,
    )
    edits = {name: [Replace(tensor)] for name, tensor in recovered.tensors.items()}
    with appearing(target, folder=True, overwrite=overwrite) as temporary:
        checksums = rewrite(pruned, temporary, edits=edits)
        write_record(open_folder(temporary), record, checksums, read_card(pruned.path))
        if finish is not None:
            finish(temporary)

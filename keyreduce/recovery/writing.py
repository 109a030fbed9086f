"""A recovered checkpoint and its record, written whole or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.outputs import appearing, read_json, write_json
from keyreduce.recovery.layers import Recovered
from keyreduce.recovery.modes import MODES, TRAINING_MODES
from keyreduce.recovery.record import read_repairs
from keyreduce.workspace import RECORD_NAME

_CARD_NAME = "README.md"


@dataclass(frozen=True)
class Replace:
    """Put other numbers into a tensor; an :class:`keyreduce.checkpoint.rewrite.Edit`."""

    tensor: torch.Tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, which stays."""
        return shape

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the other numbers."""
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
    its figures. The model card gets a line.

    Args:
        pruned: the checkpoint that was recovered.
        recovered: what recovery gave.
        target: the folder to make.
        inputs: what the recovery was made from; equal inputs give an equal result, up to rounding.
        seconds: how long it took.
        command: the command line that asked for it.
        overwrite: whether an existing one is replaced.
        figures: other figures for the record.
        finish: called with the folder before it appears, to add files to it.

    Raises:
        KeyreduceError: see :func:`keyreduce.checkpoint.rewrite.rewrite`; or the target exists.
    """
    path = pruned.path / RECORD_NAME
    record = read_json(path) if path.is_file() else {}
    entry = {
        "inputs": inputs,
        "after_step": len(record.get("steps", [])),
        "tokens": recovered.tokens,
        "seconds": seconds,
        **({"command": command} if command else {}),
        **({"layers": {str(layer): one for layer, one in recovered.layers.items()}} if recovered.layers else {}),
        **(figures or {}),
    }
    record = record | {"repairs": [*read_repairs(pruned.path), entry]}
    with appearing(target, folder=True, overwrite=overwrite) as temporary:
        rewrite(pruned, temporary, edits={name: [Replace(tensor)] for name, tensor in recovered.tensors.items()})
        write_json(temporary / RECORD_NAME, record | {"identity": open_folder(temporary).identity})
        card = temporary / _CARD_NAME
        if card.is_file():
            mode = inputs["mode"]
            summary, kind = (MODES | TRAINING_MODES).get(mode, ""), "" if mode in TRAINING_MODES else "calibration "
            share = inputs.get("repeats")
            rest = f", {share:.1%} of the rows random tokens that repeat" if share else ""
            told = f"- {mode}: {summary}; {recovered.tokens:,} tokens of {kind}text{rest}"
            before = card.read_text(encoding="utf-8")
            heading = "" if "## Repair\n" in before else "\n## Repair\n\n"
            card.write_text(f"{before.rstrip()}\n{heading}{told}\n", encoding="utf-8")
        if finish is not None:
            finish(temporary)

"""A plan and a checkpoint to a smaller checkpoint. No model is built: memory stays at about two tensors."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from keyreduce.checkpoint.card import read_card, write_record
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.record import Record
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.families import family_of
from keyreduce.families.mixer_tensors import below_mixers, check_mixers, refuse_faults
from keyreduce.outputs import appearing
from keyreduce.pruning.edits import MixerEdit, layer_edits
from keyreduce.pruning.plan import Plan
from keyreduce.pruning.savings import Savings, savings
from keyreduce.workspace import PROJECTIONS_NAME

ALGORITHM = 2
"""Raised when a cut comes out otherwise than before, so that older outputs are not taken for the same."""

CORRECTION = 1
"""The same for the corrections of a cut."""


def plan_edits(source: Checkpoint, plan: Plan) -> dict[str, list[MixerEdit]]:
    """Return tensor name -> its edits, for a whole checkpoint."""
    family, shapes = family_of(source.config, source.tensors), source.shapes
    edits: dict[str, list[MixerEdit]] = {}
    for layer, cut in plan.layers.items():
        edits |= layer_edits(family, layer, cut, shapes, source.read)
    return edits


def write_pruned(
    source: Checkpoint,
    plan: Plan,
    target: Path,
    *,
    dense: str,
    dense_config: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    command: str | None = None,
    verify: Callable[[Path], object] | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Savings:
    """Write the checkpoint that a plan leaves of ``source``, whole or not at all, and return what the cut saves.

    The record is written beside it as ``keyreduce.json``, and the model card that is made from it as ``README.md``.
    Projections, if any, are in ``keyreduce.npz``, by step and layer.

    Args:
        dense: the model as the user called it, by which later commands find what the pruned one is compared with.
            A checkpoint that was pruned already keeps the name of the one that never was.
        dense_config: the config that the user named for it, for the same purpose.
        dtype: what the weights are cast to; None leaves them.
        max_shard_size: the most bytes in a shard of several tensors; None keeps the source's shards.
        command: the command line that asked for it, for the record.
        verify: called with the finished folder before it appears; what it raises keeps it from doing so.
        progress: called with bytes written.

    Raises:
        KeyreduceError: see :func:`keyreduce.checkpoint.rewrite.rewrite`; or the target exists, or what was written
            is not what the family's table says of the new config.
    """
    family = family_of(source.config)
    earlier = Record.read(source.path)
    edits = plan_edits(source, plan)
    with appearing(target, folder=True, overwrite=overwrite) as temporary:
        checksums = rewrite(
            source,
            temporary,
            config=_with_flat_rope(family.resized(source.config, plan.after)) if edits else source.config,
            edits=edits,
            dtype=dtype,
            max_shard_size=max_shard_size,
            progress=progress,
        )
        written = open_folder(temporary)
        _check_tensors(source, written, target)
        saved = savings(source, written)
        record = earlier.with_step(
            plan.to_json() | {"smaller": saved.sentence},
            dense=dense,
            dense_config=None if dense_config is None else os.path.realpath(dense_config),
            shipped_by=family.shipped_by,
            figures=saved._asdict(),
            command=command,
        )
        _add_projections(temporary, len(earlier.steps), plan)
        write_record(written, record, checksums, read_card(source.path))
        if verify is not None:
            verify(temporary)
    return saved


def _with_flat_rope(config: dict) -> dict:
    """The config with what it nests in ``rope_parameters`` also at its top, where mlx-lm alone looks for it."""
    nested = config.get("rope_parameters")
    nested = nested if isinstance(nested, dict) else {}
    names = [name for name in ("rope_theta", "partial_rotary_factor") if nested.get(name) is not None]
    return config | {name: nested[name] for name in names if config.get(name) is None}


def _check_tensors(source: Checkpoint, written: Checkpoint, target: Path) -> None:
    """Check the mixers against the config, and all other tensors against the source."""
    check_mixers(written.config, written.shapes, target)
    found, wanted = _outside_mixers(written), _outside_mixers(source)
    refuse_faults(
        target,
        missing=[name for name in wanted if name not in found],
        left_over=[name for name in found if name not in wanted],
        reshaped={name: (shape, wanted[name]) for name, shape in found.items() if shape != wanted.get(name, shape)},
    )


def _outside_mixers(source: Checkpoint) -> dict[str, tuple[int, ...]]:
    mixers = below_mixers(source.config, source.tensors)
    return {name: shape for name, shape in source.shapes.items() if name not in mixers}


def _add_projections(folder: Path, step: int, plan: Plan) -> None:
    """Add the projections of this step to those of earlier ones, which came along with the source."""
    added = {
        f"steps.{step}.layers.{layer}.projection_HKR": cut.projection_HKR.float().numpy()
        for layer, cut in plan.layers.items()
        if cut.projection_HKR is not None
    }
    if added:
        path = folder / PROJECTIONS_NAME
        try:
            earlier = dict(np.load(path, allow_pickle=False)) if path.is_file() else {}
        except (OSError, ValueError, zipfile.BadZipFile):
            raise KeyreduceError(f"the source's {PROJECTIONS_NAME} is damaged; remove it, or prune it again") from None
        np.savez_compressed(path, **earlier, **added)  # pyright: ignore[reportArgumentType]  (no name is allow_pickle)

"""Statistics and a checkpoint to a smaller checkpoint. No model is built: memory stays at one layer's projections."""

import platform
from collections.abc import Callable
from pathlib import Path

import torch

from keyreduce import __version__
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.folder import Checkpoint
from keyreduce.checkpoint.rewrite import rewrite
from keyreduce.errors import KeyreduceError
from keyreduce.families import Family, MixerSizes, Part, family_of
from keyreduce.pruning.edits import key_channel_edits
from keyreduce.pruning.methods import LayerView, Method
from keyreduce.pruning.plan import Plan
from keyreduce.workspace import RECORD_NAME, appearing, read_json, write_json


def make_plan(
    source: Checkpoint, method: Method, keep: int, *, seed: int, statistics: Statistics | None, inputs: dict
) -> Plan:
    """Choose the key channels that stay.

    Args:
        source: the checkpoint to prune.
        method: how to choose.
        keep: how many channels of each key head stay.
        seed: for methods that draw; each layer draws from its own stream.
        statistics: the calibration sums, if the method needs them.
        inputs: what the plan is recorded to be made from.

    Raises:
        KeyreduceError: the statistics are of another model, the weights are not of the shapes that the config says,
            or a weight that the method reads is NaN or inf.
    """
    family = family_of(source.config)
    sizes = family.sizes(source.config)
    layers = family.mixer_layers(source.config)
    _check_shapes(source, family, layers)
    if statistics is not None:
        check_calibration(source, statistics.model)
        if sorted(statistics.layers) != layers:
            raise KeyreduceError("the calibration file lacks layers of this model; calibrate again with --overwrite")
    kept = {}
    for layer in layers:
        view = LayerView(
            _rows(source, family, sizes, layer, Part.QUERY),
            _rows(source, family, sizes, layer, Part.KEY),
            None if statistics is None else statistics.layers[layer],
        )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
        kept[layer] = method.select(view, keep, generator)
    return Plan(inputs, before=sizes, after=sizes._replace(head_k_dim=keep), kept=kept)


def check_calibration(source: Checkpoint, calibrated: str) -> None:
    """Refuse sums that belong to another model.

    Args:
        source: the checkpoint that is to be pruned.
        calibrated: the identity of the checkpoint that was calibrated.

    Raises:
        KeyreduceError: they differ.
    """
    if calibrated != source.identity:
        raise KeyreduceError(
            f"the calibration file was made from another model ({calibrated[:12]}) than {source.path} "
            f"({source.identity[:12]}); run keyreduce calibrate for this one, or give another --calibration or --work"
        )


def write_pruned(
    source: Checkpoint,
    plan: Plan,
    target: Path,
    *,
    dense: str,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Write the checkpoint that a plan leaves of ``source``; it appears whole or not at all.

    Args:
        source: the checkpoint to prune.
        plan: what stays.
        target: the folder to make.
        dense: the model as the user called it, by which later commands find what the pruned one is compared with.
            A checkpoint that was pruned already keeps the name of the one that never was.
        overwrite: whether an existing one is replaced.
        progress: called with bytes written.

    Returns:
        The record that was written as ``keyreduce.json``: versions, and every pruning step since the dense model.

    Raises:
        KeyreduceError: see :func:`keyreduce.checkpoint.rewrite.rewrite`; or the target exists.
    """
    family = family_of(source.config)
    earlier = read_record(source.path)
    record = {
        "dense": earlier.get("dense", dense),
        "versions": {
            "keyreduce": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "steps": [*earlier.get("steps", []), plan.to_json()],
    }
    with appearing(target, folder=True, overwrite=overwrite) as temporary:
        rewrite(
            source,
            temporary,
            config=family.resized(source.config, plan.after),
            edits=key_channel_edits(family, plan.before, plan.kept, list(source.entries)),
            progress=progress,
        )
        write_json(temporary / RECORD_NAME, record)
    return record


def read_record(folder: Path) -> dict:
    """Return what a checkpoint folder records of its pruning: ``dense``, ``steps``; empty if it was never pruned.

    Raises:
        KeyreduceError: the record is damaged.
    """
    path = folder / RECORD_NAME
    record = read_json(path) if path.is_file() else {}
    steps = record.get("steps", [])
    has_steps = isinstance(steps, list) and all(isinstance(step, dict) and "inputs" in step for step in steps)
    if not has_steps or not isinstance(record.get("dense", ""), str):
        raise KeyreduceError(f"{path} is damaged: it does not say what was pruned; remove it, or prune again")
    return record


def parameter_counts(source: Checkpoint, plan: Plan) -> dict[str, tuple[int, int]]:
    """Return the numbers of the mixers and of the whole model, before and after the cut, from headers alone."""
    family = family_of(source.config)
    edits = key_channel_edits(family, plan.before, plan.kept, list(source.entries))
    prefixes = tuple(family.tensor_name(layer, "") for layer in plan.kept)
    counts = {"mixer": [0, 0], "model": [0, 0]}
    for name, (_, entry) in source.entries.items():
        shape = entry.shape
        for edit in edits.get(name, ()):
            shape = edit.shape(shape)
        for group in ("model", "mixer") if name.startswith(prefixes) else ("model",):
            counts[group][0] += torch.Size(entry.shape).numel()
            counts[group][1] += torch.Size(shape).numel()
    return {group: (before, after) for group, (before, after) in counts.items()}


def _check_shapes(source: Checkpoint, family: Family, layers: list[int]) -> None:
    """Refuse a checkpoint whose mixers have not the shapes that its config says."""
    sizes = family.axis_sizes(source.config)
    for layer in layers:
        for short_name, parts in family.tensors.items():
            name = family.tensor_name(layer, short_name)
            if name not in source.entries:
                continue
            shape = source.entries[name][1].shape
            expected = tuple(sizes.get(part, size) for part, size in zip(parts, shape, strict=False))
            if len(shape) != len(parts) or shape != expected:
                raise KeyreduceError(
                    f"tensor {name!r} of {source.path} is {list(shape)}, which is not what config.json says: "
                    "they belong to different models"
                )


def _rows(source: Checkpoint, family: Family, sizes: MixerSizes, layer: int, part: Part) -> torch.Tensor:
    """The rows of a layer's query or key projection, float32 ``[H, K, D]``."""
    (short_name,) = [name for name, parts in family.tensors.items() if parts == (part, Part.HIDDEN)]
    name = family.tensor_name(layer, short_name)
    weight = source.read(name).float()
    if not torch.isfinite(weight).all():
        raise KeyreduceError(f"tensor {name!r} of {source.path} holds NaN or inf: the checkpoint is damaged")
    return weight.view(sizes.key_heads, sizes.head_k_dim, -1)

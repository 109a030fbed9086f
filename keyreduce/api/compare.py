"""Two calibration files, or the records of two pruned models: do they make the same choice?"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keyreduce.api.request import Request, Result, option
from keyreduce.errors import KeyreduceError
from keyreduce.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class CompareRequest(Request):
    """Compare two calibration files, or two pruned models: do they keep the same channels and heads, layer by layer?

    Of calibrations the energy of channels is compared, and what it would keep. Of pruned models no weight is read.
    """

    first: Path = option(help="Calibration file, or folder of a pruned model.", is_argument=True)
    second: Path = option(help="Another of the same kind.", is_argument=True)
    ratio: float = option(0.5, "Of calibrations: compare what stays where this share goes.", minimum=0, maximum=0.99)


@dataclass(frozen=True, kw_only=True)
class CompareResult(Result):
    """How alike two calibrations or two pruned models are."""

    first: Path
    second: Path
    kind: str  # "calibrations" or "pruned models".
    is_same: bool  # whether both keep the same heads and channels in every layer.
    # target -> the share of what one keeps that the other keeps too, a mean over heads and layers.
    overlap: dict[str, float]
    # name of an input that differs -> its value in both.
    differing: dict[str, list]
    # for each layer its number, and for each target its ``overlap``, and of calibrations the ``correlation`` of the
    # scores (Spearman's); see keyreduce.pruning.comparison.
    layers: list[dict]


def run(request: CompareRequest, reporter: Reporter = Reporter()) -> CompareResult:
    """Compare two calibration files or two pruned models.

    Raises:
        KeyreduceError: one of them is not there, damaged, or no such thing; they are not of one kind; or they are of
            models of different sizes.
    """
    from keyreduce.pruning.comparison import compare_kept, compare_statistics, mean_overlaps

    for path in (request.first, request.second):
        if not path.exists():
            raise KeyreduceError(f"there is nothing at {path}; name a calibration file, or a pruned model's folder")
    are_models = [path.is_dir() for path in (request.first, request.second)]
    if are_models[0] != are_models[1]:
        raise KeyreduceError("one is a file and one a folder: compare two calibration files, or two pruned models")
    if are_models[0]:
        ours, theirs = (_read_model(path) for path in (request.first, request.second))
        rows = compare_kept(ours[1], theirs[1])
        inputs = ours[0], theirs[0]
    else:
        from keyreduce.calibration.file import read_statistics

        first, second = (read_statistics(path) for path in (request.first, request.second))
        rows = compare_statistics(first, second, request.ratio)
        inputs = first.inputs | {"tokens": first.tokens}, second.inputs | {"tokens": second.tokens}
    known = [one["overlap"] for row in rows for name, one in row.items() if name != "layer"]
    return CompareResult(
        first=request.first,
        second=request.second,
        kind="pruned models" if are_models[0] else "calibrations",
        is_same=all(one == 1 for one in known),
        overlap=mean_overlaps(rows),
        differing=_differing(*map(_flat, inputs)),
        layers=rows,
    )


def _read_model(path: Path) -> tuple[dict, Mapping]:
    """Return what a pruned model was made from, and what it keeps of the dense one."""
    from keyreduce.checkpoint.record import Record
    from keyreduce.evaluation.kept import kept_channels

    record = Record.read(path)
    if not record.steps:
        raise KeyreduceError(f"{path} has no record of a pruning (keyreduce.json); name what prune wrote")
    inputs = {"dense": record.dense_identity, "steps": len(record.steps), **record.steps[-1]["inputs"]}
    recovered = [repair["inputs"].get("mode") for repair in record.repairs]
    return inputs | {"recover": ", ".join(map(str, recovered)) or None}, kept_channels(record)


def _flat(inputs: Mapping, prefix: str = "") -> dict[str, Any]:
    """Return inputs with the names of nested ones joined by dots."""
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list]:
    names = dict.fromkeys([*first, *second])
    return {name: [first.get(name), second.get(name)] for name in names if first.get(name) != second.get(name)}

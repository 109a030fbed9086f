"""What came out of a sweep: the runs of each way of pruning, averaged over seeds."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from keyreduce.api.tasks import RESULT_NAME, failure_of, is_done
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json
from keyreduce.sweep.record import read_sweep
from keyreduce.sweep.runs import DENSE, PRUNED


class MeanSpread(NamedTuple):
    """A mean over seeds, and the sample standard deviation (None of a single seed)."""

    mean: float
    spread: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return mean and spread of some values; where one is inf, so is the mean, and there is no spread."""
        mean = statistics.fmean(values)
        return cls(mean, statistics.stdev(values) if len(values) > 1 and math.isfinite(mean) else None)


@dataclass(frozen=True)
class Row:
    """One way of pruning one model.

    Attributes:
        model, target, method, label, repair, ratio: which; the label is the method with its options.
        seeds: over how many the figures are.
        dense: perplexity per token of the dense model.
        perplexity: per token.
        increase: perplexity over that of the dense model, minus 1.
        bits_per_byte: of held-out text.
        state: bytes of recurrent state, as a share of the dense model's.
        seconds: wall time of ``keyreduce prune``, and of ``keyreduce recover`` after it.
        speedups: what was timed -> the dense model's time into the pruned one's: the median and the spread over all
            runs of the same model, target and ratio, since they have the same sizes, whatever chose what stays.
    """

    model: str
    target: str
    method: str
    label: str
    repair: str
    ratio: float
    seeds: int
    dense: float
    perplexity: MeanSpread
    increase: MeanSpread
    bits_per_byte: MeanSpread
    state: float
    seconds: MeanSpread
    speedups: Mapping[str, MeanSpread]


class Results(NamedTuple):
    """A sweep's results.

    Attributes:
        record: its ``sweep.json``.
        rows: in the recipe's order.
        dense: model -> perplexity per token and bits per byte, of those that were measured.
        failed: title -> why, of the runs that failed.
        waiting: titles of the runs that are not done yet.
    """

    record: dict
    rows: list[Row]
    dense: dict[str, tuple[float, float]]
    failed: dict[str, str]
    waiting: list[str]

    @property
    def kinds(self) -> list[str]:
        """What was timed, over all rows."""
        return list(dict.fromkeys(kind for row in self.rows for kind in row.speedups))


def read_results(root: Path) -> Results:
    """Read what a sweep has so far.

    Raises:
        KeyreduceError: ``root`` is no folder of a sweep, or a file of it is damaged.
    """
    root, record = Path(root), read_sweep(root)
    dense: dict[str, tuple[float, float]] = {}
    groups: dict[tuple, list[dict]] = {}
    failed: dict[str, str] = {}
    waiting: list[str] = []
    for run in record["runs"]:
        folder = root / run["folder"]
        if not is_done(folder):
            why = failure_of(folder)
            if why is None:
                waiting.append(run["title"])
            else:
                failed[run["title"]] = why
            continue
        try:
            steps = read_json(folder / RESULT_NAME)["steps"]
            if run["kind"] == DENSE:
                dense[run["model"]] = _quality(steps)
            elif run["kind"] == PRUNED:
                key = tuple(run[name] for name in ("model", "target", "method", "label", "repair", "ratio"))
                groups.setdefault(key, []).append(_figures(steps))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise KeyreduceError(
                f"{folder / RESULT_NAME} is damaged; remove that folder, and run keyreduce sweep again"
            ) from error
    timed: dict[tuple, list[dict]] = {}
    for key, runs in groups.items():
        timed.setdefault(_sizes(key), []).extend(run["speedups"] for run in runs)
    rows = [_row(key, runs, dense[key[0]][0], timed[_sizes(key)]) for key, runs in groups.items() if key[0] in dense]
    return Results(record, rows, dense, failed, waiting)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points that no other beats: with more of the first, or less of the second.

    They come by the first coordinate, ascending; of equal points the first counts.
    """
    numbered = list(enumerate(points))
    front, best = [], math.inf
    for number, (_, cost) in sorted(numbered, key=lambda item: (-item[1][0], item[1][1], item[0])):
        if cost < best:
            front.append(number)
            best = cost
    return front[::-1]


def _quality(steps: Mapping) -> tuple[float, float]:
    entry = steps["eval"]["result"]["models"][-1]
    return float(entry["perplexity_per_token"]), float(entry["bits_per_byte"])


def _figures(steps: Mapping) -> dict:
    perplexity, bits = _quality(steps)
    pruned = steps["prune"]["result"]
    # A prune that an earlier, killed run had finished says no more than that.
    before, after = pruned.get("state_bytes_per_sequence", (1, math.nan))
    return {
        "perplexity": perplexity,
        "bits": bits,
        "state": after / before,
        "seconds": sum(steps[name]["seconds"] for name in ("prune", "recover") if name in steps),
        "speedups": _speedups(steps["benchmark"]["result"]) if "benchmark" in steps else {},
    }


def _speedups(report: Mapping) -> dict[str, float]:
    """Return one speedup for each kind that was timed: the longest sequences, or the most of them at once."""
    found = {}
    for kind in ("mixer", "forward"):
        for entry in report.get(kind) or ():
            if "speedup" in entry:
                found[kind] = entry["speedup"]["median"]
    for entry in report.get("decode") or ():
        timed = entry.get("graph") or entry.get("eager") or {}
        if entry["scope"] == "model" and "speedup" in timed:
            found["decode"] = timed["speedup"]["median"]
    return found


def _sizes(key: tuple) -> tuple:
    """Return what decides the sizes of a pruned model: model, target and ratio."""
    model, target, *_, ratio = key
    return model, target, ratio


def _row(key: tuple, runs: Sequence[dict], dense: float, timed: Sequence[Mapping[str, float]]) -> Row:
    model, target, method, label, repair, ratio = key
    kinds = dict.fromkeys(kind for speedups in timed for kind in speedups)
    states = [run["state"] for run in runs if not math.isnan(run["state"])]
    return Row(
        model,
        target,
        method,
        label,
        repair,
        ratio,
        seeds=len(runs),
        dense=dense,
        perplexity=MeanSpread.of([run["perplexity"] for run in runs]),
        increase=MeanSpread.of([run["perplexity"] / dense - 1 for run in runs]),
        bits_per_byte=MeanSpread.of([run["bits"] for run in runs]),
        state=statistics.fmean(states) if states else math.nan,
        seconds=MeanSpread.of([run["seconds"] for run in runs]),
        speedups={kind: _median([speedups[kind] for speedups in timed if kind in speedups]) for kind in kinds},
    )


def _median(values: Sequence[float]) -> MeanSpread:
    return MeanSpread.of(values)._replace(mean=statistics.median(values))

"""What came out of a sweep: the runs of each way of pruning, averaged over seeds. This is in the folder of a sweep:

sweep.json                 what is compared, on what text, and the list of runs
calibration/, dense/, runs/
    NAME-HASH/             a run: a task of keyreduce.api.tasks, with its log and its result
        keyreduce.json     the record of a pruned model
logs/                      what the processes printed beside the logs of the runs
table.md, .csv, .tex, .html, perplexity.png, pareto.png
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from keyreduce.api.tasks import RESULT_NAME, failure_of, is_done
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json

SWEEP_NAME = "sweep.json"
CALIBRATION, DENSE, PRUNED = "calibration", "dense", "pruned"
"""The kinds of runs."""
_WAY = ["model", "target", "method", "label", "repair", "ratio"]
_FIGURES = ("perplexity", "increase", "bits_per_byte", "seconds")


class Results(NamedTuple):
    """A sweep's results.

    Attributes:
        record: its ``sweep.json``.
        table: a line for each way of pruning, in the recipe's order. ``model``, ``target``, ``method``, ``label`` (the
            method with its options), ``repair`` and ``ratio`` say which; the figures are means over ``seeds`` seeds:
            ``perplexity`` per token, ``dense`` (that of the dense model), ``increase`` (the first over the second,
            minus 1), ``bits_per_byte``, ``state`` (bytes of recurrent state, as a share of the dense model's) and
            ``seconds`` (wall time of prune, and of recover after it). ``mixer_speedup`` and others, of what was timed,
            are the dense model's time over the pruned one's: the median over all runs of the same model, target and
            ratio, since they have the same sizes, whatever chose what stays. Columns with ``_spread`` after the name
            hold sample standard deviations: NaN of a single seed, or where a value is not finite.
        dense: model -> perplexity per token and bits per byte, of those that were measured.
        failed: title -> why, of the runs that failed.
        waiting: titles of the runs that are not done yet.
    """

    record: dict
    table: pd.DataFrame
    dense: dict[str, tuple[float, float]]
    failed: dict[str, str]
    waiting: list[str]

    @property
    def rows(self) -> list[Any]:
        """The lines of the table, with an attribute for each column."""
        return list(self.table.itertuples(index=False, name="Row"))

    @property
    def kinds(self) -> list[str]:
        """What was timed, over all rows."""
        return [name.removesuffix("_speedup") for name in self.table if str(name).endswith("_speedup")]

    @classmethod
    def of_json(cls, found: Mapping, record: dict) -> "Results":
        """Return the results that :meth:`to_json` has made a JSON object of, with a sweep's record of them."""
        rows = []
        for row in found["rows"]:
            line = {name: row[name] for name in (*_WAY, "seeds", "dense")} | {"state": _number(row["state"])}
            figures = {name: row[name] for name in _FIGURES}
            figures |= {f"{kind}_speedup": figure for kind, figure in row["speedups"].items()}
            for name, figure in figures.items():
                line |= {name: _number(figure["mean"]), f"{name}_spread": _number(figure["spread"])}
            rows.append(line)
        dense = {model: (one["perplexity"], one["bits_per_byte"]) for model, one in found["dense"].items()}
        return cls(record, pd.DataFrame(rows), dense, dict(found["failed"]), list(found["waiting"]))

    def to_json(self) -> dict:
        """Return all figures as a JSON object: ``dense``, ``rows``, what has ``failed`` and what is ``waiting``."""
        names = [*_WAY, "seeds", "dense", "perplexity", "increase", "bits_per_byte", "state", "seconds"]
        speedups = {kind: f"{kind}_speedup" for kind in self.kinds}
        rows = []
        for row in self.table.astype(object).where(self.table.notna(), None).to_dict("records"):
            figures = {
                name: {"mean": row[name], "spread": row[f"{name}_spread"]} for name in (*_FIGURES, *speedups.values())
            }
            timed = {kind: figures[name] for kind, name in speedups.items() if row[name] is not None}
            rows.append({name: figures.get(name, row[name]) for name in names} | {"speedups": timed})
        dense = {model: {"perplexity": costs[0], "bits_per_byte": costs[1]} for model, costs in self.dense.items()}
        return {"dense": dense, "rows": rows, "failed": self.failed, "waiting": self.waiting}


def read_results(root: Path) -> Results:
    """Read what a sweep has so far.

    Raises:
        KeyreduceError: ``root`` is no folder of a sweep, or a file of it is damaged.
    """
    path = root / SWEEP_NAME
    if not path.is_file():
        raise KeyreduceError(f"{root} holds no {SWEEP_NAME}; give the folder that keyreduce sweep has written")
    record = read_json(path)
    listed = record.get("runs")
    if not isinstance(listed, list) or not all(isinstance(run, dict) and "folder" in run for run in listed):
        raise KeyreduceError(f"{path} is damaged: it lists no runs; run keyreduce sweep again")
    dense: dict[str, tuple[float, float]] = {}
    runs: list[dict] = []
    failed: dict[str, str] = {}
    waiting: list[str] = []
    for run in listed:
        folder = root / run["folder"]
        if not is_done(folder):
            if (why := failure_of(folder)) is None:
                waiting.append(run["title"])
            else:
                failed[run["title"]] = why
            continue
        try:
            steps = read_json(folder / RESULT_NAME)["steps"]
            if run["kind"] == DENSE:
                dense[run["model"]] = _quality(steps)
            elif run["kind"] == PRUNED:
                runs.append({name: run[name] for name in _WAY} | _figures(steps))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise KeyreduceError(
                f"{folder / RESULT_NAME} is damaged; remove that folder, and run keyreduce sweep again"
            ) from error
    return Results(record, _table(runs, dense), dense, failed, waiting)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[int]:
    """Return the numbers of the points that no other beats: with more of the first, or less of the second.

    They come by the first coordinate, ascending; of equal points the first counts.
    """
    front, best = [], math.inf
    for number, (_, cost) in sorted(enumerate(points), key=lambda item: (-item[1][0], item[1][1], item[0])):
        if cost < best:
            front.append(number)
            best = cost
    return front[::-1]


def _quality(steps: Mapping) -> tuple[float, float]:
    entry = steps["eval"]["result"]["models"][-1]
    return float(entry["perplexity_per_token"]), float(entry["bits_per_byte"])


def _figures(steps: Mapping) -> dict[str, float]:
    perplexity, bits = _quality(steps)
    # A prune that an earlier, killed run had finished says no more than that.
    before, after = steps["prune"]["result"].get("state_bytes_per_sequence", (1, math.nan))
    seconds = sum(steps[name]["seconds"] for name in ("prune", "recover") if name in steps)
    figures = {"perplexity": perplexity, "bits_per_byte": bits, "state": after / before, "seconds": seconds}
    # One speedup for each kind that was timed: the longest sequences, or the most of them at once.
    report = steps["benchmark"]["result"] if "benchmark" in steps else {}
    for kind in ("mixer", "forward"):
        for entry in report.get(kind) or ():
            if "speedup" in entry:
                figures[f"{kind}_speedup"] = entry["speedup"]["median"]
    for entry in report.get("decode") or ():
        timed = entry.get("graph") or entry.get("eager") or {}
        if entry["scope"] == "model" and "speedup" in timed:
            figures["decode_speedup"] = timed["speedup"]["median"]
    return figures


def _table(runs: list[dict], dense: Mapping[str, tuple[float, float]]) -> pd.DataFrame:
    """Return the table of :class:`Results`, without models that were not measured dense."""
    table = pd.DataFrame([run | {"dense": dense[run["model"]][0]} for run in runs if run["model"] in dense])
    if table.empty:
        return table
    table["increase"] = table["perplexity"] / table["dense"] - 1
    columns: dict[str, tuple] = {"seeds": ("dense", "size"), "dense": ("dense", "first"), "state": ("state", "mean")}
    for name in _FIGURES:
        columns |= {name: (name, statistics.fmean), f"{name}_spread": (name, _spread)}
    for name in [name for name in table if str(name).endswith("_speedup")]:
        of_sizes = table.groupby(["model", "target", "ratio"])[name]
        table[f"{name}_spread"], table[name] = of_sizes.transform("std"), of_sizes.transform("median")
        columns |= {name: (name, "first"), f"{name}_spread": (f"{name}_spread", "first")}
    return table.groupby(_WAY, sort=False).agg(**columns).reset_index()


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _spread(values: pd.Series) -> float:
    return statistics.stdev(values) if len(values) > 1 and math.isfinite(sum(values)) else math.nan

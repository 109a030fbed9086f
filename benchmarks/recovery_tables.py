"""The tables of `recovery_study.py`, from what it measured."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import mean

from result_tables import REPAIR_WORDS, table


def recovery_tables(found: Mapping) -> Iterator[str]:
    """Yield how much higher perplexity is than that of the dense model, and recall, if that was measured."""
    dense, runs = found["dense"], found["recoveries"]
    title = f"perplexity of the dense model {dense['perplexity']:.4f}; increase over it by tokens trained"
    yield from (f"{title}; seconds of the longest run", "")
    yield from _table(runs, lambda run: 100 * (run["perplexity"] / dense["perplexity"] - 1), "+.2f")
    for kind, right in dense["recall"].items():
        yield from ("", f"{kind}, right answers of eight; the dense model {100 * right:.1f}%", "")
        yield from _table(runs, lambda run, kind=kind: 100 * run["recall"][kind], ".1f")


def _table(runs: Sequence[Mapping], read: Callable[[Mapping], float], form: str) -> Iterator[str]:
    """Yield each start x kind by tokens: the mean over seeds of what ``read`` finds in a run, in percent."""
    columns = sorted({0, *(run["tokens"] for run in runs)})
    by_start: dict[tuple, list[Mapping]] = {}
    for run in runs:
        by_start.setdefault((run["method"], run["ratio"], run["repair"]), []).append(run)
    rows = []
    for (method, ratio, repair), of_start in sorted(by_start.items()):
        # What a start has untrained is the column of no tokens of each kind of training.
        for kind in sorted({run["kind"] for run in of_start if run["kind"]}) or [""]:
            row = [run for run in of_start if run["kind"] in (None, kind)]
            cells = [_mean_and_spread([read(run) for run in row if run["tokens"] == count], form) for count in columns]
            share = ratio if "=" in ratio else f"{float(ratio):.0%}"
            seconds = f"{max(run['seconds'] for run in row):.0f}"
            rows.append([method, share, REPAIR_WORDS.get(repair, repair), kind, *cells, seconds])
    millions = [f"{count / 1e6:g}M" for count in columns[1:]]
    yield from table(["method", "pruned", "first", "training", "0", *millions, "s"], rows)


def _mean_and_spread(values: Sequence[float], form: str) -> str:
    """Return the mean of percentages, and half the distance between the extremes where there are several."""
    spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}%" if values else ""

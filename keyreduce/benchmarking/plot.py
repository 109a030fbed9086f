"""A report drawn as charts: speedup and memory against the key size, and decoding against its lower bound."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

_SCOPES = {"model": "whole model", "mixer": "one mixer layer", "operator": "operator alone"}


def plot_report(report: dict, path: Path) -> None:
    """Draw a report of :func:`keyreduce.benchmarking.report.benchmark_report`; the file's suffix chooses the format."""
    sequences = [kind for kind in ("mixer", "forward", "train_step") if report.get(kind)]
    scopes = list(dict.fromkeys(entry["scope"] for entry in report.get("decode", ())))
    rows = [panels for panels in (2 * bool(sequences), len(scopes)) if panels]
    settings = report["settings"]
    figure = Figure(figsize=(4.6 * max(rows, default=1), 0.4 + 3.8 * len(rows)), layout="constrained")
    figure.suptitle(f"{settings['device']}, {settings['dtype']}", fontsize=10)
    parts = list(figure.subfigures(max(len(rows), 1), 1, squeeze=False)[:, 0])
    if sequences:
        _draw_sequences(parts.pop(0).subplots(1, 2), {kind: report[kind] for kind in sequences})
    if scopes:
        axes = parts.pop(0).subplots(1, len(scopes), squeeze=False)[0]
        for axis, scope in zip(axes, scopes, strict=True):
            _draw_decoding(axis, scope, [entry for entry in report["decode"] if entry["scope"] == scope])
    figure.savefig(path, dpi=120)


def _draw_sequences(axes: Sequence[Axes], entries_of: dict[str, list[dict]]) -> None:
    speed, memory = axes
    for kind, all_entries in entries_of.items():
        for seq_len, entries in _grouped(all_entries, "seq_len").items():
            name = f"{kind.replace('_', ' ')}, {seq_len} tokens"
            _line(speed, entries, [entry.get("speedup", {}).get("median", 1.0) for entry in entries], label=name)
            peaks = [entry["peak_memory_bytes"] for entry in entries]
            _line(memory, entries, [peak / peaks[0] if peaks[0] else 1.0 for peak in peaks], label=name)
    _finish(speed, "Speed against the first", "times as fast")
    _finish(memory, "Peak memory against the first", "share")
    memory.set_ylim(bottom=0)


def _draw_decoding(axis: Axes, scope: str, chosen: Sequence[dict]) -> None:
    for number, (batch_size, entries) in enumerate(_grouped(chosen, "batch_size").items()):
        color, ways = f"C{number}", [entry["graph"] or entry["eager"] for entry in entries]
        latencies = [way["latency_seconds"]["median"] * 1e6 for way in ways]
        _line(axis, entries, latencies, label=f"batch {batch_size}", color=color)
        floors = [entry["floor_seconds"] * 1e6 for entry in entries]
        _line(axis, entries, floors, color=color, linestyle=":", marker="")
    way = "CUDA graph" if chosen[0]["graph"] else "launched by Python"
    axis.set_yscale("log")
    _finish(axis, f"Decode, {_SCOPES[scope]} ({way})\ndotted: floor of memory traffic", "microseconds a step")


def _grouped(entries: Sequence[dict], by: str) -> dict[int, list[dict]]:
    groups: dict[int, list[dict]] = {}
    for entry in entries:
        groups.setdefault(entry[by], []).append(entry)
    return groups


def _line(axis: Axes, entries: Sequence[dict], values: Sequence[float], **style: Any) -> None:
    axis.plot([entry["head_k_dim"] for entry in entries], values, **{"marker": "o", **style})


def _finish(axis: Axes, title: str, unit: str) -> None:
    keys = sorted({key for line in axis.get_lines() for key in cast(list[int], line.get_xdata())})
    axis.set_xticks(keys, [str(key) for key in keys])
    axis.invert_xaxis()
    axis.legend(fontsize=8)
    if axis.get_yscale() == "log":
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.15)  # room for the legend
        axis.legend(fontsize=8, loc="upper center", ncols=3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set(title=title, xlabel="key channels a head (K)", ylabel=unit)
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)

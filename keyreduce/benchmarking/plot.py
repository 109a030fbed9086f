"""A report drawn as charts: speedup and memory against the sizes of a head, and decoding against its lower bound."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

_SCOPES = {"model": "whole model", "mixer": "one mixer layer", "operator": "operator alone"}


class _Scale(NamedTuple):
    """Where entries stand on the horizontal axis, what is written there, and what the axis is called."""

    place_of: dict[str, int]  # by label
    ticks: dict[int, str]
    name: str


def plot_report(report: dict, path: Path) -> None:
    """Draw a report of :func:`keyreduce.benchmarking.report.benchmark_report`; the file's suffix chooses the format."""
    sequences = [kind for kind in ("mixer", "forward", "train_step") if report.get(kind)]
    scopes = list(dict.fromkeys(entry["scope"] for entry in report.get("decode", ())))
    rows = [panels for panels in (2 * bool(sequences), len(scopes)) if panels]
    settings = report["settings"]
    scale = _scale([entry for kind in (*sequences, "decode") for entry in report.get(kind, ())])
    figure = Figure(figsize=(4.6 * max(rows, default=1), 0.4 + 3.8 * len(rows)), layout="constrained")
    figure.suptitle(f"{settings['device']}, {settings['dtype']}", fontsize=10)
    parts = list(figure.subfigures(max(len(rows), 1), 1, squeeze=False)[:, 0])
    if sequences:
        _draw_sequences(parts.pop(0).subplots(1, 2), {kind: report[kind] for kind in sequences}, scale)
    if scopes:
        axes = parts.pop(0).subplots(1, len(scopes), squeeze=False)[0]
        for axis, scope in zip(axes, scopes, strict=True):
            _draw_decoding(axis, scope, [entry for entry in report["decode"] if entry["scope"] == scope], scale)
    figure.savefig(path, dpi=120)


def _scale(entries: Sequence[dict]) -> _Scale:
    """Return the scale of key sizes, from large to small; where value sizes differ too, of pairs in their order."""
    # Reports of earlier versions do not say the value size, which was the same then.
    pairs = {entry["label"]: (entry["head_k_dim"], entry.get("head_v_dim")) for entry in entries}
    if len({values for _, values in pairs.values()}) == 1:
        places = {label: -keys for label, (keys, _) in pairs.items()}
        return _Scale(places, {-keys: str(keys) for keys, _ in pairs.values()}, "key channels a head (K)")
    places = {label: number for number, label in enumerate(pairs)}
    ticks = {number: f"{keys}x{values}" for number, (keys, values) in enumerate(pairs.values())}
    return _Scale(places, ticks, "key x value channels a head")


def _draw_sequences(axes: Sequence[Axes], entries_of: dict[str, list[dict]], scale: _Scale) -> None:
    speed, memory = axes
    for kind, all_entries in entries_of.items():
        for seq_len, entries in _grouped(all_entries, "seq_len").items():
            name = f"{kind.replace('_', ' ')}, {seq_len} tokens"
            _line(speed, scale, entries, [entry.get("speedup", {}).get("median", 1.0) for entry in entries], label=name)
            peaks = [entry["peak_memory_bytes"] for entry in entries]
            _line(memory, scale, entries, [peak / peaks[0] if peaks[0] else 1.0 for peak in peaks], label=name)
    _finish(speed, scale, "Speed against the first", "times as fast")
    _finish(memory, scale, "Peak memory against the first", "share")
    memory.set_ylim(bottom=0)


def _draw_decoding(axis: Axes, scope: str, chosen: Sequence[dict], scale: _Scale) -> None:
    for number, (batch_size, entries) in enumerate(_grouped(chosen, "batch_size").items()):
        color, ways = f"C{number}", [entry["graph"] or entry["eager"] for entry in entries]
        latencies = [way["latency_seconds"]["median"] * 1e6 for way in ways]
        _line(axis, scale, entries, latencies, label=f"batch {batch_size}", color=color)
        floors = [entry["floor_seconds"] * 1e6 for entry in entries]
        _line(axis, scale, entries, floors, color=color, linestyle=":", marker="")
    way = "CUDA graph" if chosen[0]["graph"] else "launched by Python"
    axis.set_yscale("log")
    _finish(axis, scale, f"Decode, {_SCOPES[scope]} ({way})\ndotted: floor of memory traffic", "microseconds a step")


def _grouped(entries: Sequence[dict], by: str) -> dict[int, list[dict]]:
    groups: dict[int, list[dict]] = {}
    for entry in entries:
        groups.setdefault(entry[by], []).append(entry)
    return groups


def _line(axis: Axes, scale: _Scale, entries: Sequence[dict], values: Sequence[float], **style: Any) -> None:
    axis.plot([scale.place_of[entry["label"]] for entry in entries], values, **{"marker": "o", **style})


def _finish(axis: Axes, scale: _Scale, title: str, unit: str) -> None:
    axis.set_xticks(list(scale.ticks), list(scale.ticks.values()))
    axis.legend(fontsize=8)
    if axis.get_yscale() == "log":
        low, high = axis.get_ylim()
        axis.set_ylim(low, high * (high / low) ** 0.15)  # room for the legend
        axis.legend(fontsize=8, loc="upper center", ncols=3)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set(title=title, xlabel=scale.name, ylabel=unit)
    axis.title.set_fontsize(10)
    axis.grid(alpha=0.3)

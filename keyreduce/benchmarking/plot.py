"""A report drawn as charts: speedup and memory against the sizes of a head, and decoding against its lower bound."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from keyreduce import drawing

_KINDS = {"mixer": "one mixer layer", "forward": "whole model, reading a prompt", "train_step": "a step of training"}
_SCOPES = {"model": "whole model", "mixer": "one mixer layer", "operator": "delta-rule operator alone"}


class _Scale(NamedTuple):
    """Where entries stand on the horizontal axis, what is written there, and what the axis is called."""

    place_of: dict[str, int]  # by label
    ticks: dict[int, str]
    name: str


class _Series(NamedTuple):
    """One line: its entries, and for each a number with its 95% interval."""

    label: str
    entries: Sequence[dict]
    values: Sequence[tuple[float, float, float]]  # low, middle, high


def plot_report(report: dict, path: Path, model: str | None = None) -> None:
    """Write the picture of a report, as :func:`draw_report` draws it; the file's suffix chooses the format."""
    drawing.save_picture(draw_report(report, model), path)


def draw_report(report: dict, model: str | None = None) -> Figure:
    """Draw a report of :func:`keyreduce.benchmarking.report.benchmark_report`.

    The title calls the models ``model``, or what the report says of them. Intervals are those of the medians.
    """
    sequences = [kind for kind in _KINDS if report.get(kind)]
    scopes = list(dict.fromkeys(entry["scope"] for entry in report.get("decode", ())))
    rows = [panels for panels in (2 * bool(sequences), len(scopes)) if panels]
    settings = report["settings"]
    scale = _scale([entry for kind in (*sequences, "decode") for entry in report.get(kind, ())])
    about = drawing.joined(
        f"{settings['device']}, {settings['dtype']}",
        "medians of rounds in which the models take turns, with 95% intervals",
    )
    title = f"{model or _models(report)}: time and memory"
    figure = drawing.new_figure(4.6 * max([2, *rows]), 4.4 * len(rows), title, about=about)
    parts = list(figure.subfigures(max(len(rows), 1), 1, squeeze=False)[:, 0])
    if sequences:
        _draw_sequences(parts.pop(0), {kind: report[kind] for kind in sequences}, scale)
    if scopes:
        _draw_decoding(parts.pop(0), scopes, report["decode"], scale)
    return figure


def _models(report: dict) -> str:
    """Return what a title calls the models of a report: their folders, or what kind of random models they are."""
    first, *others = report["models"]
    if first["folder"] is None:
        kind = f"{first['model_type']} of {first['layers']} layers, hidden size {first['hidden_size']}"
        return f"{kind}, {first['key_heads']} key heads, random weights"
    names = dict.fromkeys(Path(entry["folder"]).name for entry in (first, *others))
    return " and ".join(names)


def _scale(entries: Sequence[dict]) -> _Scale:
    """Return the scale of key sizes, from large to small; where value sizes differ too, of pairs in their order."""
    # Reports of earlier versions do not say the value size, which was the same then.
    pairs = {entry["label"]: (entry["head_k_dim"], entry.get("head_v_dim")) for entry in entries}
    if len({values for _, values in pairs.values()}) == 1:
        places = {label: -keys for label, (keys, _) in pairs.items()}
        return _Scale(places, {-keys: str(keys) for keys, _ in pairs.values()}, "key channels of a head (K)")
    places = {label: number for number, label in enumerate(pairs)}
    ticks = {number: f"{keys}x{values}" for number, (keys, values) in enumerate(pairs.values())}
    return _Scale(places, ticks, "key x value channels of a head")


def _draw_sequences(part: Any, entries_of: dict[str, list[dict]], scale: _Scale) -> None:
    speeds, memories = [], []
    for kind, all_entries in entries_of.items():
        for seq_len, entries in _grouped(all_entries, "seq_len").items():
            name = f"{_KINDS[kind]}, {entries[0]['batch_size']:,} x {seq_len:,} tokens"
            speeds.append(_Series(name, entries, [_interval(entry.get("speedup"), 1.0) for entry in entries]))
            # What one peak was measured once, and has no interval.
            peaks = [entry["peak_memory_bytes"] for entry in entries]
            shares = [peak / peaks[0] if peaks[0] else 1.0 for peak in peaks]
            memories.append(_Series(name, entries, [(share, share, share) for share in shares]))
    first = next(iter(entries_of.values()))[0]["label"]
    speed, memory = part.subplots(1, 2)
    handles = _lines(speed, scale, speeds)
    _lines(memory, scale, memories)
    _finish(speed, scale, "Speed on whole sequences", f"times as fast as {first}")
    _finish(memory, scale, "Peak memory on whole sequences, beyond weights", f"share of the memory of {first}")
    memory.set_ylim(bottom=0)
    drawing.legend(part, handles, columns=3)


def _draw_decoding(part: Any, scopes: Sequence[str], decode: Sequence[dict], scale: _Scale) -> None:
    handles: list[Artist] = []
    for axes, scope in zip(part.subplots(1, len(scopes), squeeze=False)[0], scopes, strict=True):
        chosen = [entry for entry in decode if entry["scope"] == scope]
        steps, floors = [], []
        for batch_size, entries in _grouped(chosen, "batch_size").items():
            times = [(entry["graph"] or entry["eager"])["latency_seconds"] for entry in entries]
            steps.append(_Series(f"{batch_size:,} at once", entries, [_interval(time, 1e6) for time in times]))
            floors.append([entry["floor_seconds"] * 1e6 for entry in entries])
        handles = _lines(axes, scale, steps, linestyle="-")  # dotted is the lower bound
        for number, (series, floor) in enumerate(zip(steps, floors, strict=True)):
            places = [scale.place_of[entry["label"]] for entry in series.entries]
            axes.plot(places, floor, ":", color=drawing.marked(number)["color"], linewidth=1.2)
        way = "CUDA graph" if chosen[0]["graph"] else "launched by Python"
        middles = [middle for series in steps for _, middle, _ in series.values]
        drawing.logarithmic(axes, [*middles, *(time for floor in floors for time in floor)])
        _finish(axes, scale, f"Decoding, {_SCOPES[scope]}\n({way})", "microseconds a step")
    floor = Line2D([], [], color=drawing.GREY, linestyle=":", label="lower bound: weights and states moved once")
    drawing.legend(part, [*handles, floor])


def _interval(found: dict | None, factor: float) -> tuple[float, float, float]:
    """Return a median with its interval, times a factor; 1 where there is none, which is the first model itself."""
    if found is None:
        return 1.0, 1.0, 1.0
    return factor * found["low"], factor * found["median"], factor * found["high"]


def _grouped(entries: Sequence[dict], by: str) -> dict[int, list[dict]]:
    groups: dict[int, list[dict]] = {}
    for entry in entries:
        groups.setdefault(entry[by], []).append(entry)
    return groups


def _lines(axes: Axes, scale: _Scale, all_series: Sequence[_Series], **style: Any) -> list[Artist]:
    """Draw lines with intervals, beside each other where they would coincide, and return what a legend shows."""
    handles: list[Artist] = []
    for number, series in enumerate(all_series):
        places = [scale.place_of[entry["label"]] for entry in series.entries]
        low, middle, high = zip(*series.values, strict=True)
        below, above = ([abs(m - e) for m, e in zip(middle, ends, strict=True)] for ends in (low, high))
        look = drawing.lined(number) | style
        drawing.errorbars(axes, places, middle, [below, above], look, place=number, of=len(all_series))
        handles.append(Line2D([], [], label=series.label, **look))
    return handles


def _finish(axes: Axes, scale: _Scale, title: str, unit: str) -> None:
    axes.set_xticks(list(scale.ticks), list(scale.ticks.values()))
    axes.margins(x=0.08)
    drawing.finish(axes, title=title, x=scale.name, y=unit)

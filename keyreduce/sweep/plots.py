"""The pictures of a sweep: perplexity against the share removed, and against speed."""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D

from keyreduce import drawing
from keyreduce.sweep.recipe import NO_REPAIR
from keyreduce.sweep.results import Results, pareto_front

_LEGEND_INCHES = 2.3
_LOGARITHMIC_FROM = 3.0  # times as much at the top as at the bottom
_DENSE: dict[str, Any] = {"color": "0.35", "marker": "*", "markersize": 11, "linestyle": ""}
_AXES = {
    "mixer": "mixer layer, times as fast as dense",
    "forward": "whole model, times as fast as dense",
    "decode": "decoding, times as fast as dense",
    "state": "state, times as small as dense",
}


def draw_perplexity(results: Results) -> Canvas:
    """Draw perplexity against the share removed: a panel for each model and target, bars for the spread over seeds.

    Methods stand beside each other at each share, so that none covers another.
    """
    table = results.table
    models, targets = table["model"].unique(), table["target"].unique()
    style = _Style(results)
    title = drawing.joined("perplexity against the share removed", _spread_words(results))
    figure, panels = _panels(len(models), len(targets), style, title, _about(results))
    for line, model in zip(panels, models, strict=True):
        for axes, target in zip(line, targets, strict=True):
            rows: Any = table[(table["model"] == model) & (table["target"] == target)]
            if rows.empty:
                axes.set_axis_off()
                continue
            dense = rows["dense"].iloc[0]
            groups = list(rows.groupby(["label", "repair"], sort=False))
            for place, ((label, repair), chosen) in enumerate(groups):
                chosen = chosen.sort_values("ratio")
                look = style.markers[label] | {"linestyle": style.lines[repair], "linewidth": 1.5}
                look |= {"markevery": slice(1, None)}  # the first is the dense model's, where all begin
                drawing.errorbars(
                    axes,
                    [0, *(100 * chosen["ratio"])],
                    [dense, *chosen["perplexity"]],
                    [math.nan, *chosen["perplexity_spread"]],
                    look,
                    place=place,
                    of=len(groups),
                )
            axes.axhline(dense, color="0.5", linewidth=0.8, zorder=0)
            axes.margins(x=0.08)  # what stands beside its share is seen whole
            axes.set_xticks([0, *(100 * ratio for ratio in sorted(rows["ratio"].unique()))])
            what = {"key": "key channels", "value": "value channels", "head": "heads"}.get(target, target)
            drawing.finish(axes, title=f"{model}, {target}", x=f"share of {what} removed, %", y="perplexity per token")
            _scale(axes, [dense, *rows["perplexity"]])
    return figure


def draw_pareto(results: Results) -> Canvas:
    """Draw perplexity against what was timed, or against the state's size where nothing was.

    The front is the line through what nothing else beats in both: what is left of it is as good, but slower. Bars are
    the spreads over seeds.
    """
    models, kinds = results.table["model"].unique(), results.kinds or ["state"]
    style = _Style(results)
    against = "speed" if results.kinds else "the size of the state"
    title = drawing.joined(f"perplexity against {against}", _spread_words(results))
    figure, panels = _panels(len(models), len(kinds), style, title, _about(results), front=True)
    several = len(results.table["target"].unique()) > 1
    for line, model in zip(panels, models, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            rows = [row for row in results.rows if row.model == model and not math.isnan(_gain(row, kind))]
            rows = [row for row in rows if math.isfinite(row.perplexity)]
            dense = results.dense[model][0]
            points = [(1.0, dense), *((_gain(row, kind), row.perplexity) for row in rows)]
            for row, point in zip(rows, points[1:], strict=True):
                bars = {"xerr": getattr(row, f"{kind}_speedup_spread", math.nan), "yerr": row.perplexity_spread}
                axes.errorbar(*point, **bars, fmt="none", ecolor=style.markers[row.label]["color"], elinewidth=1)
                axes.plot(*point, linestyle="", fillstyle=style.fills[row.repair], **style.markers[row.label])
            axes.plot(1.0, dense, **_DENSE)
            front = pareto_front(points)
            axes.plot(*zip(*(points[number] for number in front), strict=True), color="0.35", linewidth=1, zorder=0)
            words = ["", *(f"{row.target + ' ' if several else ''}{100 * row.ratio:g}%" for row in rows)]
            drawing.finish(axes, title=model, x=_AXES[kind], y="perplexity per token")
            axes.margins(x=0.12, y=0.1)
            _scale(axes, [cost for _, cost in points])
            _label_front(axes, [points[number] for number in front], [words[number] for number in front])
    return figure


class _Style:
    """Which colour and marker stand for each method, and which line and filling for each repair."""

    def __init__(self, results: Results):
        labels, repairs = results.table["label"].unique(), results.table["repair"].unique()
        self.markers: dict[str, dict[str, Any]] = {label: drawing.marked(number) for number, label in enumerate(labels)}
        self.lines: dict[str, Any] = dict(zip(repairs, cycle(drawing.LINES)))
        self.fills = dict(zip(repairs, cycle(("full", "none", "left", "top"))))


def _about(results: Results) -> str:
    """Return what the title says of text and device."""
    record = results.record
    text = drawing.text_words((record.get("heldout") or {}).get("text") or {})
    return drawing.joined(f"held-out {text}" if text else "", str(record.get("device", "")))


def _spread_words(results: Results) -> str:
    """Return what the bars are, where there are any."""
    seeds = sorted({row.seeds for row in results.rows if row.seeds > 1})
    if not seeds:
        return ""
    return f"bars: sample standard deviation over {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds"


def _panels(
    rows: int, columns: int, style: _Style, title: str, about: str, *, front: bool = False
) -> tuple[Canvas, Any]:
    """Return a figure and its axes, with a legend: the methods, and in black the repairs, where there are several."""
    line = "" if front else "-"
    handles = [Line2D([], [], label=label, linestyle=line, **look) for label, look in style.markers.items()]
    for repair, line in style.lines.items() if [*style.lines] != [NO_REPAIR] else ():
        word = "no repair" if repair == NO_REPAIR else repair
        look: dict[str, Any] = {"linestyle": "", "marker": "o", "fillstyle": style.fills[repair]}
        look = look if front else {"linestyle": line}
        handles.append(Line2D([], [], color="black", label=word, **look))
    if front:
        handles.append(Line2D([], [], label="dense", **_DENSE))
        handles.append(Line2D([], [], color="0.35", linewidth=1, label="Pareto front"))
    else:
        handles.append(Line2D([], [], color="0.5", linewidth=0.8, label="dense"))
    height = max(3.6 * rows, 0.25 * len(handles) + 0.6)
    figure = drawing.new_figure(4.6 * columns + _LEGEND_INCHES, height, title, about=about)
    panels = figure.subplots(rows, columns, squeeze=False)
    drawing.legend(figure, handles, columns=1, side="right center")
    return figure, panels


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the perplexity's axis logarithmic where its values differ much, with plain numbers on it."""
    finite = [value for value in values if math.isfinite(value)]
    if max(finite) / min(finite) >= _LOGARITHMIC_FROM:
        drawing.logarithmic(axes, finite)


def _label_front(axes: Axes, points: Sequence[tuple[float, float]], words: Sequence[str]) -> None:
    """Write words beside the points of a front, which rises to the right: below them on their right is free.

    Where the word of the point before stands there already, it comes above the point.
    """
    axes.autoscale_view()  # which matplotlib puts off until it draws
    below = None
    for (gain, cost), word in zip(points, words, strict=True):
        x, y = axes.transData.transform((gain, cost)) * 72 / axes.figure.dpi  # in points, as the font is
        is_taken = below is not None and x - below[0] < 5 * len(below[2]) and abs(y - below[1]) < 10
        place = {"xytext": (5, 7 if is_taken else -11), "textcoords": "offset points"}
        axes.annotate(word, (gain, cost), fontsize=8, color="0.25", **place)
        if word and not is_taken:
            below = (x, y, word)


def _gain(row: Any, kind: str) -> float:
    return 1 / row.state if kind == "state" else getattr(row, f"{kind}_speedup")

"""The pictures of a sweep: perplexity against the share removed, and against speed."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from keyreduce.sweep.recipe import NO_REPAIR
from keyreduce.sweep.results import Results, Row, pareto_front

# Okabe and Ito's colours, which the colour-blind tell apart, with brown for their yellow, which is pale on white, and
# four more, as there are twelve markers.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D46")
_COLORS += ("#6A3D9A", "#8B0000", "#7F7F00", "#7F8FA9")
_MARKERS = "osD^vPXp<>hd"
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
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
    """Draw perplexity against the share removed: a panel for each model and target, bars for the spread over seeds."""
    models = list(dict.fromkeys(row.model for row in results.rows))
    targets = list(dict.fromkeys(row.target for row in results.rows))
    style = _Style(results.rows)
    figure, panels = _panels(len(models), len(targets), style)
    for line, model in zip(panels, models, strict=True):
        for axes, target in zip(line, targets, strict=True):
            rows = [row for row in results.rows if (row.model, row.target) == (model, target)]
            if not rows:
                axes.set_axis_off()
                continue
            dense = rows[0].dense
            for label, repair in dict.fromkeys((row.label, row.repair) for row in rows):
                chosen = sorted((row for row in rows if (row.label, row.repair) == (label, repair)), key=_ratio)
                axes.errorbar(
                    [0, *(100 * row.ratio for row in chosen)],
                    [dense, *(row.perplexity.mean for row in chosen)],
                    yerr=[0, *(row.perplexity.spread or 0 for row in chosen)],
                    color=style.color(label),
                    linestyle=style.line(repair),
                    capsize=2,
                    linewidth=1.5,
                    elinewidth=1,
                    **style.marker(label),
                )
            axes.axhline(dense, color="0.5", linewidth=0.8, zorder=0)
            axes.set_xticks([0, *(100 * ratio for ratio in sorted({row.ratio for row in rows}))])
            axes.set(title=f"{model}, {target}", xlabel=f"share of {target} removed, %", ylabel="perplexity per token")
            _scale(axes, [dense, *(row.perplexity.mean for row in rows)])
    return figure


def draw_pareto(results: Results) -> Canvas:
    """Draw perplexity against what was timed, or against the state's size where nothing was.

    The front is the line through what nothing else beats in both: what is left of it is as good, but slower.
    """
    models = list(dict.fromkeys(row.model for row in results.rows))
    kinds = results.kinds or ["state"]
    style = _Style(results.rows)
    figure, panels = _panels(len(models), len(kinds), style, front=True)
    several = len({row.target for row in results.rows}) > 1
    for line, model in zip(panels, models, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            rows = [row for row in results.rows if row.model == model and not math.isnan(_gain(row, kind))]
            rows = [row for row in rows if math.isfinite(row.perplexity.mean)]
            dense = results.dense[model][0]
            points = [(1.0, dense), *((_gain(row, kind), row.perplexity.mean) for row in rows)]
            for row, (gain, cost) in zip(rows, points[1:], strict=True):
                axes.plot(
                    gain,
                    cost,
                    color=style.color(row.label),
                    linestyle="",
                    fillstyle=style.fill(row.repair),
                    **style.marker(row.label),
                )
            axes.plot(1.0, dense, **_DENSE)
            front = pareto_front(points)
            axes.plot(*zip(*(points[number] for number in front), strict=True), color="0.35", linewidth=1, zorder=0)
            words = ["", *(f"{row.target + ' ' if several else ''}{100 * row.ratio:g}%" for row in rows)]
            axes.set(title=model, xlabel=_AXES[kind], ylabel="perplexity per token")
            axes.margins(x=0.12, y=0.1)
            _scale(axes, [cost for _, cost in points])
            _label_front(axes, [points[number] for number in front], [words[number] for number in front])
    return figure


class _Style:
    """Which colour, marker and line stands for which method and repair."""

    def __init__(self, rows: Sequence[Row]):
        self.labels = list(dict.fromkeys(row.label for row in rows))
        self.repairs = list(dict.fromkeys(row.repair for row in rows))

    def color(self, label: str) -> str:
        return _COLORS[self.labels.index(label) % len(_COLORS)]

    def marker(self, label: str) -> dict[str, Any]:
        return {"marker": _MARKERS[self.labels.index(label) % len(_MARKERS)], "markersize": 6}

    def line(self, repair: str):
        return _LINES[self.repairs.index(repair) % len(_LINES)]

    def fill(self, repair: str) -> str:
        return ("full", "none", "left", "top")[self.repairs.index(repair) % 4]

    def legend(self, *, front: bool) -> list[Line2D]:
        """Handles: the methods, and in black the repairs, where there are several."""
        handles = [
            Line2D([], [], color=self.color(label), label=label, linestyle="" if front else "-", **self.marker(label))
            for label in self.labels
        ]
        if len(self.repairs) > 1 or self.repairs != [NO_REPAIR]:
            for repair in self.repairs:
                word = "no repair" if repair == NO_REPAIR else repair
                look: dict[str, Any] = {"linestyle": self.line(repair)}
                if front:
                    look = {"linestyle": "", "marker": "o", "fillstyle": self.fill(repair)}
                handles.append(Line2D([], [], color="black", label=word, **look))
        if front:
            handles.append(Line2D([], [], label="dense", **_DENSE))
            handles.append(Line2D([], [], color="0.35", linewidth=1, label="Pareto front"))
        else:
            handles.append(Line2D([], [], color="0.5", linewidth=0.8, label="dense"))
        return handles


def _panels(rows: int, columns: int, style: _Style, *, front: bool = False) -> tuple[Canvas, Any]:
    handles = style.legend(front=front)
    height = max(3.6 * rows, 0.25 * len(handles) + 0.6)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Canvas(figsize=(4.6 * columns + _LEGEND_INCHES, height), layout=layout)
    panels = figure.subplots(rows, columns, squeeze=False)
    figure.legend(handles=handles, loc="outside right center", fontsize=9, frameon=False)
    for axes in panels.flat:
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.title.set_fontsize(11)
    return figure, panels


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the perplexity's axis logarithmic where its values differ much, with plain numbers on it."""
    finite = [value for value in values if math.isfinite(value)]
    ratio = max(finite) / min(finite)
    if ratio < _LOGARITHMIC_FROM:
        return
    axes.set_yscale("log")
    steps = (1, 1.5, 2, 3, 4, 6, 8) if ratio < 10 else (1, 2, 5) if ratio < 1000 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


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


def _gain(row: Row, kind: str) -> float:
    if kind == "state":
        return 1 / row.state
    return row.speedups[kind].mean if kind in row.speedups else math.nan


def _ratio(row: Row) -> float:
    return row.ratio

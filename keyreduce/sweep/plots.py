"""The pictures of a sweep: perplexity against the share removed, and against speed."""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from keyreduce.sweep.recipe import NO_REPAIR
from keyreduce.sweep.results import Results, pareto_front

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
    table = results.table
    models, targets = table["model"].unique(), table["target"].unique()
    style = _Style(results)
    figure, panels = _panels(len(models), len(targets), style)
    for line, model in zip(panels, models, strict=True):
        for axes, target in zip(line, targets, strict=True):
            rows: Any = table[(table["model"] == model) & (table["target"] == target)]
            if rows.empty:
                axes.set_axis_off()
                continue
            dense = rows["dense"].iloc[0]
            for (label, repair), chosen in rows.groupby(["label", "repair"], sort=False):
                chosen = chosen.sort_values("ratio")
                axes.errorbar(
                    [0, *(100 * chosen["ratio"])],
                    [dense, *chosen["perplexity"]],
                    yerr=[0, *chosen["perplexity_spread"].fillna(0)],
                    **style.markers[label],
                    **{"linestyle": style.lines[repair], "linewidth": 1.5, "elinewidth": 1, "capsize": 2},
                )
            axes.axhline(dense, color="0.5", linewidth=0.8, zorder=0)
            axes.set_xticks([0, *(100 * ratio for ratio in sorted(rows["ratio"].unique()))])
            axes.set(title=f"{model}, {target}", xlabel=f"share of {target} removed, %", ylabel="perplexity per token")
            _scale(axes, [dense, *rows["perplexity"]])
    return figure


def draw_pareto(results: Results) -> Canvas:
    """Draw perplexity against what was timed, or against the state's size where nothing was.

    The front is the line through what nothing else beats in both: what is left of it is as good, but slower.
    """
    models, kinds = results.table["model"].unique(), results.kinds or ["state"]
    style = _Style(results)
    figure, panels = _panels(len(models), len(kinds), style, front=True)
    several = len(results.table["target"].unique()) > 1
    for line, model in zip(panels, models, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            rows = [row for row in results.rows if row.model == model and not math.isnan(_gain(row, kind))]
            rows = [row for row in rows if math.isfinite(row.perplexity)]
            dense = results.dense[model][0]
            points = [(1.0, dense), *((_gain(row, kind), row.perplexity) for row in rows)]
            for row, point in zip(rows, points[1:], strict=True):
                axes.plot(*point, linestyle="", fillstyle=style.fills[row.repair], **style.markers[row.label])
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
    """Which colour and marker stand for each method, and which line and filling for each repair."""

    def __init__(self, results: Results):
        labels, repairs = results.table["label"].unique(), results.table["repair"].unique()
        self.markers: dict[str, dict[str, Any]] = {
            label: {"color": color, "marker": marker, "markersize": 6}
            for label, color, marker in zip(labels, cycle(_COLORS), cycle(_MARKERS))
        }
        self.lines: dict[str, Any] = dict(zip(repairs, cycle(_LINES)))
        self.fills = dict(zip(repairs, cycle(("full", "none", "left", "top"))))


def _panels(rows: int, columns: int, style: _Style, *, front: bool = False) -> tuple[Canvas, Any]:
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


def _gain(row: Any, kind: str) -> float:
    return 1 / row.state if kind == "state" else getattr(row, f"{kind}_speedup")

"""The picture of a search: what each candidate costs, and the least that any sizes do at so many bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from keyreduce import drawing
from keyreduce.outputs import appearing

_LEAST = 1e-4  # a loss below it is drawn at the foot
_SHOWN = 32  # candidates that are drawn at most


def write_picture(found: Mapping, model: str, path: Path, *, about: str = "") -> None:
    """Draw a search and write it as PNG; KeyreduceError if the file cannot be written."""
    figure = draw_search(found, model, about=about)
    with appearing(path, folder=False, overwrite=True) as temporary:
        drawing.save_picture(figure, temporary, format="png")


def draw_search(found: Mapping, model: str, *, about: str = "") -> Figure:
    """Draw what :meth:`keyreduce.pruning.search.Found.to_json` holds; ``about`` names text and device.

    On top: the least predicted loss of any sizes, against the bytes of the state. Below: the predicted loss of each
    candidate and, where the best few were measured, their increase in perplexity with twice its standard error. The
    choice has a ring.
    """
    is_measured = found["search"] == "measured"
    recovery = f"\nafter {found['measured_after']}" if found.get("measured_after") else ""
    follows = f", {found['recover']} to follow" if found["recover"] else ""
    title = f"{model}: cuts that fit into the budget{follows}"
    figure = drawing.new_figure(8, 9.6 if is_measured else 6.6, title, about=about)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2, 5 if is_measured else 3])
    top, bottom = parts
    looks = {dtype: drawing.marked(number) for number, dtype in enumerate(found["frontier"])}
    _draw_frontier(top.subplots(), found, looks)
    panels = bottom.subplots(2 if is_measured else 1, 1, squeeze=False, sharex=True)[:, 0]
    shown = _shown(found["candidates"])
    for dtype, look in looks.items():
        chosen = {number: row for number, row in enumerate(shown) if row["state_dtype"] == dtype}
        panels[0].plot(list(chosen), [_drawn(row["predicted"]) for row in chosen.values()], linestyle="", **look)
    drawing.logarithmic(panels[0], [_drawn(row["predicted"]) for row in shown])
    drawing.finish(panels[0], x="", y="predicted loss\n(no unit)")
    ring = shown.index(found["chosen"])
    panels[0].scatter([ring], [_drawn(found["chosen"]["predicted"])], **drawing.CHOSEN)
    if is_measured:
        _draw_measured(panels[1], shown, looks)
        panels[1].scatter([ring], [100 * found["chosen"]["perplexity_increase"]], **drawing.CHOSEN)
        drawing.finish(panels[1], x="", y=f"perplexity over dense\n(%), measured{recovery}")
    labels = [f"{row['key_heads']} x {row['head_k_dim']} x {row['head_v_dim']}" for row in shown]
    panels[-1].set_xticks(range(len(shown)), labels, rotation=90, fontsize="small")
    hidden = len(found["candidates"]) - len(shown)
    beside = f"; {hidden} more, of a larger predicted loss, are not drawn" if hidden else ""
    panels[-1].set_xlabel(f"key heads x key channels x value channels that stay{beside}")
    drawing.legend(figure, _handles(looks, is_measured))
    return figure


def _drawn(loss: float) -> float:
    return max(_LEAST, loss)


def _shown(candidates: Sequence[Mapping]) -> list[Mapping]:
    """Return the candidates that are drawn, in the order of their sizes: all, or those before the others."""
    ordered = list(candidates[:_SHOWN])
    formats = list(dict.fromkeys(row["state_dtype"] for row in ordered))

    def key(row: Mapping) -> tuple:
        return formats.index(row["state_dtype"]), -row["key_heads"], -row["head_k_dim"], -row["head_v_dim"]

    return sorted(ordered, key=key)


def _draw_frontier(axes: Axes, found: Mapping, looks: Mapping[str, dict[str, Any]]) -> None:
    for number, (dtype, points) in enumerate(found["frontier"].items()):
        sizes, losses = [size / 2**10 for size, _ in points], [_drawn(loss) for _, loss in points]
        line = drawing.LINES[number % len(drawing.LINES)]
        axes.plot(sizes, losses, linestyle=line, color=looks[dtype]["color"], linewidth=1.5)
    chosen = found["chosen"]
    place = [chosen["state_bytes"] / 2**10], [_drawn(chosen["predicted"])]
    axes.plot(*place, linestyle="", **looks[chosen["state_dtype"]])
    axes.scatter(*place, **drawing.CHOSEN, zorder=3)
    every = [loss for points in found["frontier"].values() for _, loss in points]
    drawing.logarithmic(axes, [_drawn(loss) for loss in (*every, chosen["predicted"])])
    title = "lines: the least predicted loss of any sizes, in the format of the colour"
    drawing.finish(axes, title=title, x="state of a sequence in all layers (KiB)", y="predicted loss\n(no unit)")


def _draw_measured(axes: Axes, shown: Sequence[Mapping], looks: Mapping[str, dict[str, Any]]) -> None:
    measured = {number: row for number, row in enumerate(shown) if "perplexity_increase" in row}
    for dtype, look in looks.items():
        rows = {number: row for number, row in measured.items() if row["state_dtype"] == dtype}
        if rows:
            increases = [100 * row["perplexity_increase"] for row in rows.values()]
            errors = [200 * row["perplexity_error"] for row in rows.values()]
            drawing.errorbars(axes, list(rows), increases, errors, look | {"linestyle": ""})


def _handles(looks: Mapping[str, dict[str, Any]], is_measured: bool) -> list[Artist]:
    handles: list[Artist] = [
        Line2D([], [], label=f"state in {dtype}", linestyle=drawing.LINES[number % len(drawing.LINES)], **look)
        for number, (dtype, look) in enumerate(looks.items())
    ]
    ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": drawing.BLACK}
    handles.append(Line2D([], [], linestyle="", label="chosen", **ring))
    if is_measured:
        handles.append(Line2D([], [], color=drawing.GREY, linestyle="", marker="|", label="twice the standard error"))
    return handles

"""How every picture looks: colours, markers and lines, a title that says what is shown, a legend beside the data.

The colours are those of Okabe and Ito, which can be told apart with colour blindness too; each series also has a marker
or a line of its own, so that a print without colours is read as well.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import offset_copy

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK, GREY, PALE = "#000000", "#595959", "#DDDDDD"
# Without the palette's yellow, too pale for a line on white; the last five are not of it, for where there are many.
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, "#8C6D46", "#6A3D9A", "#8B0000", "#7F7F00", "#7F8FA9")
MARKERS = "osD^vPXp<>hd"
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
CHOSEN: dict[str, Any] = {"s": 180, "facecolors": "none", "edgecolors": BLACK, "linewidths": 1.5}
"""The ring around a point that was chosen, for :meth:`Axes.scatter`."""
_APART, _WIDEST = 3.0, 12.0  # points, between series that would lie on each other, and from the first to the last
_DPI = 150
_LETTERS = 12  # of a title, in an inch


def marked(number: int) -> dict[str, Any]:
    """Return the colour and the marker of a series; twelve differ in both, and the next twelve have hollow markers."""
    look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5.5}
    return look | ({"markerfacecolor": "white"} if number // len(COLOURS) % 2 else {})


def lined(number: int) -> dict[str, Any]:
    """Return the colour, the marker and the line of a series; four differ in the line alone."""
    return marked(number) | {"linestyle": LINES[number % len(LINES)], "linewidth": 1.5}


def new_figure(width: float, height: float, title: str, *, about: str = "") -> Figure:
    """Return a figure of so many inches, without those of its title, which says what is drawn and of which model.

    ``about`` stands below it: the text and the device, where the picture depends on them.
    """
    # Lines break behind a semicolon, where that is possible.
    whole = (re.sub(r"(?<!;) ", "\xa0", text) for text in (title, about))
    lines = [line.replace("\xa0", " ") for text in whole for line in textwrap.wrap(text, int(_LETTERS * width))]
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(width, height + 0.2 * len(lines)), layout=layout)
    figure.suptitle("\n".join(lines), fontsize="medium")
    return figure


def finish(axes: Axes, *, title: str = "", x: str, y: str) -> None:
    """Label axes, with a light grid and no frame above and on the right."""
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def logarithmic(axes: Axes, values: Iterable[float]) -> None:
    """Make the vertical axis logarithmic, with plain numbers on it; ``values`` are what is drawn."""
    finite = [value for value in values if math.isfinite(value) and value > 0]
    ratio = max(finite) / min(finite)
    steps = (1, 1.5, 2, 3, 4, 6, 8) if ratio < 10 else (1, 2, 5) if ratio < 1000 else (1,)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(figure: Any, handles: Sequence[Artist], *, columns: int = 4, side: str = "lower center") -> None:
    """Put a legend outside of all axes of a figure or a part of one, so that it hides nothing."""
    columns = min(columns, len(handles))
    figure.legend(handles=handles, loc=f"outside {side}", ncols=columns, fontsize="small", frameon=False)


def errorbars(
    axes: Axes,
    x: Sequence[float],
    y: Sequence[float],
    error: Any,
    look: Mapping[str, Any],
    *,
    place: int = 0,
    of: int = 1,
) -> ErrorbarContainer:
    """Draw one of several series with its intervals, some points to the side, so that none covers another.

    ``place`` is its number among the ``of`` series; what the axis says is true of the middle one. ``error`` is as
    :meth:`Axes.errorbar` takes it, and the data of the lines are what they are.
    """
    drawn = axes.errorbar(x, y, yerr=error, elinewidth=1.2, capsize=3, capthick=1.2, **look)
    figure: Any = axes.figure
    apart = min(_APART, _WIDEST / max(of - 1, 1))
    moved = offset_copy(axes.transData, fig=figure, x=apart * (place - (of - 1) / 2), units="points")
    # Only now: with another transform the axes would not take account of the data.
    line, caps, bars = drawn.lines
    for artist in (*([line] if line else []), *caps, *bars):
        artist.set_transform(moved)
    return drawn


def save_picture(figure: Figure, path: Path, format: str | None = None, *, made_from: str | None = None) -> None:
    """Write a figure to a file; without a format its suffix says which. A PNG can say what it is made from."""
    metadata = None if made_from is None else {"Description": made_from}
    figure.savefig(path, dpi=_DPI, format=format, metadata=metadata)


def text_words(described: Mapping) -> str:
    """Return in words what text :meth:`keyreduce.data.text.TextSource.describe` speaks of."""
    kind = described.get("kind")
    if kind == "stdlib":
        return f"text: standard library of Python {described['python']}, {described['split']} files"
    if kind == "files":
        first, *others = [Path(path).name for path in described["paths"]]
        return f"text: {first}" + (f" and {len(others)} more" if others else "")
    if kind == "dataset":
        return f"text: {', '.join(str(described[name]) for name in ('name', 'config', 'split') if described[name])}"
    return f"text: {described['documents']:,} documents" if kind == "documents" else ""


def joined(*parts: str) -> str:
    """Join what a title says, without what is empty."""
    return "; ".join(filter(None, parts))

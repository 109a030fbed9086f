"""The picture of the state's bytes against perplexity: fewer bits, fewer channels, and both, of one model."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from result_tables import REPAIR_WORDS

from keyreduce import drawing
from keyreduce.families import MixerSizes, family_of
from keyreduce.serving.state_formats import bytes_of

SHIPPED = Path(__file__).parents[1] / "keyreduce/models/shipped"
_MOST = 60.0  # percent; what costs more is not drawn
_NEAR = 0.2  # percent; points of one size that are nearer to each other get one label
_FORMATS = "all channels, in fewer bits"
_COST = "perplexity over dense, %"


class Point(NamedTuple):
    """What one way of storing the state costs: bytes of a sequence, perplexity over dense and its spread in percent."""

    bytes: float
    cost: float
    spread: float
    label: str


class Known(NamedTuple):
    """What the committed JSON says of one model.

    Attributes:
        precision: of benchmarks/state_precision.py, the state rounded after each token.
        grids, studies: of benchmarks/state_budget.py and benchmarks/budget_study.py.
    """

    model: str
    precision: Mapping
    grids: Sequence[Mapping]
    studies: Sequence[Mapping]

    @property
    def dense_bytes(self) -> int:
        """What a sequence takes in float32."""
        return next(one["bytes_per_sequence"] for one in self.precision["states"] if one["dtype"] == "float32")

    def bytes_of(self, sizes: Sequence[int], dtype: str) -> float:
        """Return what a sequence takes whose mixers have these key heads and key and value channels."""
        dense, cut = self._dense_sizes, MixerSizes(sizes[0], sizes[0], sizes[1], sizes[2])
        return self.dense_bytes * bytes_of(dtype, {0: cut}) / bytes_of("float32", {0: dense})

    @property
    def _dense_sizes(self) -> MixerSizes:
        """One value head for a key head: all numbers are a share of the dense model's, in which that cancels."""
        cuts = [cut for grid in self.grids for cut in grid["cuts"]]
        if cuts:
            heads, keys, values = (max(cut[name] for cut in cuts) for name in ("key_heads", "head_k_dim", "head_v_dim"))
        else:
            config = json.loads((SHIPPED / self.model / "config.json").read_text())
            sizes = next(iter(family_of(config).layer_sizes(config).values()))
            heads, keys, values = sizes.key_heads, sizes.head_k_dim, sizes.head_v_dim
        return MixerSizes(heads, heads, keys, values)


def draw_state(known: Known) -> Figure:
    """Draw all that is known of a model: fewer bits as points, fewer channels as lines, by repair and format."""
    title = f"What a smaller state costs: {known.model}, {known.precision['parameters'] / 1e6:.1f}M parameters"
    figure = drawing.new_figure(8.5, 4.6, title, about=_about(known))
    axes = figure.subplots()
    series = _series(known)
    handles = []
    for number, (name, points) in enumerate(series.items()):
        style: dict[str, Any] = {"linestyle": ""} if name == _FORMATS else {}
        look = drawing.lined(number) | {"markersize": 6.5} | style
        spreads = [point.spread for point in points] if any(point.spread for point in points) else None
        x, y = [point.bytes / 1024 for point in points], [point.cost for point in points]
        container = drawing.errorbars(axes, x, y, spreads, look)
        container.set_label(name)
        handles.append(container)
        _label(axes, points)
    drawn = [(one.bytes / 1024, one.cost, one.spread) for points in series.values() for one in points]
    scale_axes(axes, known.dense_bytes / 1024, drawn)
    drawing.finish(axes, x="state of a sequence in all layers, KiB (share of the dense state in float32)", y=_COST)
    drawing.legend(figure, handles, columns=2)
    return figure


def _about(known: Known) -> str:
    report = known.precision
    amounts = [f"formats: {report['rows'] * (report['seq_len'] - 1):,} predictions"]
    amounts += [f"cuts: {grid['predictions']:,}" for grid in known.grids[:1] if not known.studies]
    amounts += [f"cuts: {study['heldout_rows']} rows of 1,024 tokens" for study in known.studies[:1]]
    words = report["command"].split()
    text = words[words.index("--text") + 1] if "--text" in words else "Python's standard library"
    return drawing.joined(f"held-out text: {text}", ", ".join(amounts), "float32")


def _series(known: Known) -> dict[str, list[Point]]:
    """Return the points of each line, from many bytes to few."""
    found: dict[str, list[Point]] = {_FORMATS: []}
    for state in known.precision["states"]:
        cost = 100 * state["perplexity_increase"]
        if state["dtype"] != "float32":
            found[_FORMATS].append(Point(state["bytes_per_sequence"], cost, 0.0, state["dtype"]))
    measured = {run["repair"] for study in known.studies for run in study["runs"]}
    for grid in known.grids if "none" not in measured else ():
        points = [Point(cut["state"] * known.dense_bytes, 100 * cut["corrected"], 0.0, "") for cut in grid["cuts"]]
        found["fewer channels, no repair (the best sizes of a grid)"] = list(_frontier(points))
    for study in known.studies:
        found |= _of_study(known, study)
    return {name: kept for name, points in found.items() if (kept := [one for one in points if one.cost <= _MOST])}


def _of_study(known: Known, study: Mapping) -> dict[str, list[Point]]:
    """Return a line for each repair of the sizes that a budget chose, and for the last also one for each format."""
    base = study["dense"]["perplexity"]
    groups: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for run in study["runs"]:
        if run["cut"].startswith("state="):
            size = known.bytes_of(run["sizes"], run["state_dtype"])
            key = run["repair"], run["state_dtype"], run["cut"]
            groups.setdefault(key, []).append((size, 100 * (run["perplexity"] / base - 1)))
    found: dict[str, list[Point]] = {}
    for (repair, dtype, _), runs in groups.items():
        costs = [cost for _, cost in runs]
        error = stdev(costs) if len(costs) > 1 else 0.0
        name = f"fewer channels, {REPAIR_WORDS.get(repair, repair)}" + ("" if dtype == "float32" else f", in {dtype}")
        found.setdefault(name, []).append(Point(mean(size for size, _ in runs), mean(costs), error, ""))
    return {name: sorted(points, reverse=True) for name, points in found.items()}


def _frontier(points: Iterable[Point]) -> Iterable[Point]:
    """Yield the points than which no other has both fewer bytes and a smaller cost, from many bytes to few."""
    best: list[Point] = []
    for point in sorted(points):
        if not best or point.cost < best[-1].cost:
            best.append(point)
    return reversed(best)


def _label(axes: Axes, points: Sequence[Point]) -> None:
    """Write labels on the right of points; those that nearly coincide share one."""
    named = sorted((point for point in points if point.label), key=lambda point: (-point.bytes, point.cost))
    while named:
        first = named[0]
        group = [one for one in named if abs(one.bytes / first.bytes - 1) < 0.1 and one.cost - first.cost < _NEAR]
        named = [one for one in named if one not in group]
        place = first.bytes / 1024, mean(one.cost for one in group)
        words = ", ".join(one.label for one in group)
        # Not on the line of the dense model.
        shift = 5 if abs(place[1]) < 0.1 else -3
        axes.annotate(words, place, xytext=(7, shift), textcoords="offset points", fontsize="small")


def scale_axes(axes: Axes, dense: float, points: Sequence[tuple[float, float, float]]) -> None:
    """Make both axes logarithmic, the vertical one down to 1%, with plain numbers; the dense model is a line at 0.

    ``points`` are sizes of the state in the unit of ``dense``, costs in percent, and their spreads.
    """
    axes.axhline(0, color=drawing.GREY, linewidth=0.8)
    axes.plot([dense], [0], "*", color=drawing.BLACK, markersize=12)
    axes.annotate("dense, float32", (dense, 0), xytext=(8, 5), textcoords="offset points", fontsize="small")
    axes.set_yscale("symlog", linthresh=1, linscale=0.7)
    top, least = max(cost + spread for _, cost, spread in points), min(size for size, _, _ in points)
    axes.set_ylim(min(-0.3, min(cost for _, cost, _ in points) - 0.2), top * 1.25)
    ticks = [tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50) if tick <= top * 1.25]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    axes.set_xscale("log")
    words = {1: "all", 2: "a half", 4: "a quarter", 8: "an eighth", 16: "a sixteenth"}
    shares = [share for share in words if dense / share >= least * 0.7]
    axes.set_xlim(dense * 1.15, least * 0.8)
    axes.xaxis.set_minor_locator(NullLocator())
    sizes = [dense / share for share in shares]
    digits = ",.0f" if dense >= 100 else ".3g"
    axes.set_xticks(sizes, [f"{size:{digits}}\n({words[share]})" for size, share in zip(sizes, shares, strict=True)])

"""The pictures of `scale_study.py`: what a smaller state costs, against the size of the model and against its bytes."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from result_tables import REPAIR_WORDS
from scale_tables import removed, rise, state_bytes
from state_picture import scale_axes

from keyreduce import drawing

_COST = "perplexity over dense, %"
_RULES = {"delta_net": "DeltaNet", "gated_deltanet": "Gated DeltaNet"}
_HYBRIDS = "hybrids"
_MIB = 2**20


def draw_by_size(found: Sequence[Mapping]) -> Figure:
    """Draw the cost of each repair against the parameters of the models: a panel for each rule and share removed.

    Hybrids have a column of their own, in which they stand side by side.
    """
    kinds = dict.fromkeys([*_RULES, *(_kind(one) for one in found)])
    columns = [models for kind in kinds if (models := [one for one in found if _kind(one) == kind])]
    shares = sorted({removed(run) for one in found for run in one["runs"] if removed(run)})
    figure = drawing.new_figure(4.3 * len(columns), 3.3 * len(shares), _title(found), about=_about(found))
    panels = figure.subplots(len(shares), len(columns), squeeze=False, sharex="col")
    looks: dict[str, dict[str, Any]] = {}
    handles: dict[str, Any] = {}
    for share, row in zip(shares, panels, strict=True):
        for models, axes in zip(columns, row, strict=True):
            kind = _kind(models[0])
            sizes = [one["training"]["parameters"] / 1e6 for one in models]
            places = [float(place) for place in range(len(models))] if kind == _HYBRIDS else sizes
            for name, points in _lines(models, places, share).items():
                look = looks.setdefault(name, drawing.lined(len(looks))) | (
                    {"linestyle": ""} if kind == _HYBRIDS else {}
                )
                container = drawing.errorbars(axes, *zip(*sorted(points), strict=True), None, look)
                container.set_label(name)
                handles.setdefault(name, container)
            if kind == _HYBRIDS:
                names = [one["model"].rpartition("-")[0] for one in models]
                axes.set_xticks(places, [f"{name}\n{size:.0f}M" for name, size in zip(names, sizes, strict=True)])
                axes.margins(x=0.2)
            else:
                axes.set_xscale("log")
                axes.xaxis.set_minor_locator(NullLocator())
                axes.set_xticks(sorted(sizes), [f"{size:.0f}M" for size in sorted(sizes)])
            axes.axhline(0, color=drawing.GREY, linewidth=0.8)
            if not any(removed(run) == share for one in models for run in one["runs"]):
                axes.set_yticks([])
                axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
            title = f"{_RULES.get(kind, kind)}, {share:.0%} of the state removed"
            x = "model" if kind == _HYBRIDS else "parameters"
            drawing.finish(axes, title=title, x=x if share == shares[-1] else "", y=_COST)
    drawing.legend(figure, list(handles.values()), columns=3)
    return figure


def draw_by_bytes(found: Sequence[Mapping]) -> Figure:
    """Draw the cost against the bytes of each model's state: fewer bits as points, fewer channels by repair."""
    title = f"What a smaller state costs: {_named(found[0])}" if len(found) == 1 else _title(found)
    figure = drawing.new_figure(max(8.5, 6.2 * len(found)), 4.6, title, about=_about(found))
    looks: dict[str, dict[str, Any]] = {}
    handles: dict[str, Any] = {}
    ways = [_by_bytes(one) for one in found]
    costs = [cost for way in ways for points in way.values() for _, cost in points]
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for one, way, axes in zip(found, ways, panels, strict=True):
        for name, points in way.items():
            style: dict[str, Any] = {"linestyle": ""} if len(points) == 1 or name == _BITS else {}
            style |= {} if name == _BITS else {"fillstyle": "none"}  # some lie upon others
            look = looks.setdefault(name, drawing.lined(len(looks))) | {"markersize": 6.5} | style
            container = drawing.errorbars(axes, *zip(*sorted(points, reverse=True), strict=True), None, look)
            container.set_label(name)
            handles.setdefault(name, container)
        for run in one["runs"]:
            if not removed(run):
                place = state_bytes(one["config"], run) / _MIB, rise(run, one["dense"])
                shift = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": "small"}
                axes.annotate(run["state_dtype"], place, **shift)
        least = min(size for points in way.values() for size, _ in points)
        scale_axes(axes, state_bytes(one["config"], {}) / _MIB, [(least, cost, 0.0) for cost in costs])
        x = "state of a sequence in all layers, MiB (share of the dense state in float32)"
        title = _named(one) if len(found) > 1 else ""
        drawing.finish(axes, title=title, x=x, y=_COST if axes is panels[0] else "")
    drawing.legend(figure, list(handles.values()), columns=2)
    return figure


_BITS = "all channels, in fewer bits"


def _kind(one: Mapping) -> str:
    """Return the rule of a model, or what all that have softmax attention too are called."""
    rule = one["config"]["model_type"]
    return rule if rule in _RULES else _HYBRIDS


def _lines(found: Sequence[Mapping], places: Sequence[float], share: float) -> dict[str, list[tuple[float, float]]]:
    """Return repair -> (place, cost) of each model, for one share removed, states in float32."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for one, place in zip(found, places, strict=True):
        for run in _drawn(one):
            if removed(run) == share and "state_dtype" not in run:
                lines.setdefault(_repair(run), []).append((place, rise(run, one["dense"])))
    return lines


def _by_bytes(one: Mapping) -> dict[str, list[tuple[float, float]]]:
    """Return way -> (MiB, cost) of one model's runs."""
    ways: dict[str, list[tuple[float, float]]] = {}
    for run in _drawn(one):
        dtype = run.get("state_dtype", "float32")
        name = f"fewer channels, {_repair(run)}" + ("" if dtype == "float32" else f", in {dtype}")
        point = state_bytes(one["config"], run) / _MIB, rise(run, one["dense"])
        ways.setdefault(name if removed(run) else _BITS, []).append(point)
    return ways


def _drawn(one: Mapping) -> list[Mapping]:
    """Return the runs of a model without the uncorrected cuts, which cost so much that all else would be small."""
    return [run for run in one["runs"] if run["repair"] != "exact"]


def _repair(run: Mapping) -> str:
    repair = REPAIR_WORDS.get(run["repair"], run["repair"])
    if not run["tokens"]:
        return repair
    options = dict(part.partition("=")[::2] for part in run["kind"].partition(":")[2].split(","))
    rate = f" at a rate of {options['lr']}" if "lr" in options else ""
    return f"{repair}, then {run['tokens'] / 1e6:g}M tokens distilled{rate}"


def _title(found: Sequence[Mapping]) -> str:
    sizes = sorted({f"{one['training']['parameters'] / 1e6:.0f}M" for one in found}, key=lambda size: float(size[:-1]))
    of = sizes[0] if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    return f"What a smaller state costs: models of {of} parameters"


def _named(one: Mapping) -> str:
    rule = _RULES.get(one["config"]["model_type"], one["model"])
    return f"{rule} of {one['training']['parameters'] / 1e6:.0f}M parameters"


def _about(found: Sequence[Mapping]) -> str:
    seen = [one["training"]["tokens_seen"] / 1e6 for one in found]
    of = f"{median(seen):.0f}M" if len(seen) == 1 else f"{min(seen):.0f}M to {max(seen):.0f}M"
    return drawing.joined(
        f"trained on {of} tokens of installed packages' text",
        "held-out text: other files",
        found[0]["training"]["device"],
    )

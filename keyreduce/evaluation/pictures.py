"""Pictures of rank utilisation, and of what pruning kept: figures of matplotlib, to be saved as PNG.

The colours can be distinguished with colour blindness too: the maps are matplotlib's cividis and PuOr, the other
colours are of the palette of Okabe & Ito.

Shapes: L layers, W value heads, P positions, X heads, R channels, K taps.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.filters import filters_of
from keyreduce.evaluation.kept import Kept
from keyreduce.families import family_of
from keyreduce.outputs import appearing

BLUE, VERMILION, YELLOW, PALE, BLACK = "#0072B2", "#D55E00", "#F0E442", "#DDDDDD", "#000000"
_LINES = ((BLUE, "-"), (VERMILION, "--"))
_DPI = 150
_OURS = re.compile(r"(rank-heat-map|rank-curves|kept-channels|filters-layer-\d+)\.png")


def refuse_other_files(folder: Path) -> None:
    """Raise a KeyreduceError if a folder, which is replaced as a whole, holds other files than our pictures."""
    others = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)) if folder.is_dir() else []
    if others:
        raise KeyreduceError(
            f"{folder} holds other files, such as {others[0]!r}, and pictures would replace it; give another folder"
        )


def draw_folder(folder: Path, report: Mapping, kept: Mapping[int, Kept], dense: Checkpoint) -> list[str]:
    """Draw all pictures of a report, which has what :func:`draw_curves` takes, and return their names.

    The folder appears whole or not at all, and replaces an earlier one; a KeyreduceError says that it cannot be
    written. ``kept`` has what pruning kept of each layer; it is empty where that is not known. The convolution kernels
    are those of the ``dense`` checkpoint.
    """
    with appearing(folder, folder=True, overwrite=True) as temporary:

        def save(figure: Figure, name: str) -> None:
            figure.savefig(temporary / f"{name}.png", dpi=_DPI)

        save(draw_heat_map(report["models"]), "rank-heat-map")
        save(draw_curves(report["positions"], report["models"]), "rank-curves")
        if kept:
            save(draw_kept_channels(kept), "kept-channels")
        for layer in family_of(dense.config).mixer_layers(dense.config):
            filters = {name: kernels.numpy() for name, kernels in filters_of(dense, layer).items()}
            if filters:
                save(draw_filters(layer, filters, kept.get(layer)), f"filters-layer-{layer:02}")
        return sorted(path.name for path in temporary.iterdir())


def draw_heat_map(models: Sequence[Mapping]) -> Figure:
    """Draw the rank utilisation of each layer and head, the mean over positions; models side by side, on one scale.

    Args:
        models: for each a ``label``, and ``layers`` with ``layer``, ``heads`` (their numbers in the dense model) and
            ``utilisation``, for each head a number from 0 to 1 at each position: the report of ``keyreduce rank``.
    """
    layers = _layers(models)
    heads = 1 + max(head for model in models for entry in model["layers"] for head in entry["heads"])
    maps = []
    for model in models:
        percent_LW = np.full((len(layers), heads), np.nan)
        for entry in model["layers"]:
            percent_LW[layers.index(entry["layer"]), entry["heads"]] = 100 * np.mean(entry["utilisation"], axis=1)
        maps.append(percent_LW)
    top = max(np.nanmax(percent_LW) for percent_LW in maps)
    cell = min(0.4, 9 / heads)
    width, height = max(2.2, cell * heads), max(1.6, 0.26 * len(layers))
    figure = Figure(figsize=(len(maps) * (width + 0.6) + 1.1, height + 1.3), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for axes, model, percent_LW in zip(panels, models, maps, strict=True):
        axes.patch.set(hatch="////", edgecolor="0.6")
        axes.imshow(percent_LW, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set(title=model["label"], xlabel="value head")
        _whole_ticks(axes, range(heads), axis="x")
        for (row, column), percent in np.ndenumerate(percent_LW):
            if cell >= 0.38 and np.isfinite(percent):
                # The map is dark at its low end.
                colour = "white" if percent < 0.55 * top else "black"
                axes.text(column, row, f"{percent:.1f}", ha="center", va="center", fontsize=6.5, color=colour)
    panels[0].set_ylabel("layer")
    _whole_ticks(panels[0], layers, axis="y")
    label = "rank utilisation (%)\nmean along the sequence"
    figure.colorbar(panels[0].images[0], ax=panels, label=label, pad=0.02, aspect=30)
    if any(np.isnan(percent_LW).any() for percent_LW in maps):
        figure.supxlabel("hatched: no such head", fontsize="small")
    return figure


def draw_curves(positions: Sequence[int], models: Sequence[Mapping]) -> Figure:
    """Draw rank utilisation along the sequence, one panel for each layer: the mean over its heads, and their range.

    Positions are in tokens; models are as :func:`draw_heat_map` takes them, two at most.
    """
    layers = _layers(models)
    columns = min(6, math.ceil(math.sqrt(len(layers))))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(max(7, 2.3 * columns + 0.4), 1.7 * rows + 1.0), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes, layer in zip(panels, layers, strict=False):
        for model, (colour, style) in zip(models, _LINES, strict=False):
            for entry in model["layers"]:
                if entry["layer"] == layer:
                    percent_WP = 100 * np.array(entry["utilisation"])
                    marker = "o" if len(positions) == 1 else None
                    low_P, high_P = percent_WP.min(axis=0), percent_WP.max(axis=0)
                    axes.fill_between(positions, low_P, high_P, color=colour, alpha=0.2, linewidth=0)
                    axes.plot(positions, percent_WP.mean(axis=0), style, color=colour, marker=marker)
        axes.set_title(f"layer {layer}", fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(layers) - columns) : len(layers)]:
        axes.tick_params(labelbottom=True)
    top = max(max(map(max, entry["utilisation"])) for model in models for entry in model["layers"])
    panels[0].set(xlim=(0, None), ylim=(0, 100 * top * 1.1))
    figure.supxlabel("tokens read")
    figure.supylabel("rank utilisation (%)")
    handles = [
        axes_line
        for model, (colour, style) in zip(models, _LINES, strict=False)
        for axes_line in panels[0].plot([], [], style, color=colour, label=f"{model['label']}: mean of the heads")
    ] + [Patch(facecolor="0.5", alpha=0.3, label="range of the heads")]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize="small", frameon=False)
    return figure


def draw_kept_channels(kept: Mapping[int, Kept]) -> Figure:
    """Draw which key and value channels of the dense model are kept: one row for each head, layer by layer."""
    maps = {kind: {layer: _states(kind, one) for layer, one in kept.items()} for kind in ("key", "value")}
    colours = {"removed": PALE, "kept": BLUE, "head removed": VERMILION, "projected together": YELLOW}
    rows = max(sum(len(states_XR) for states_XR in by_layer.values()) for by_layer in maps.values())
    figure = Figure(figsize=(11, min(14, max(2.0, 0.16 * rows)) + 1.3), layout="constrained")
    seen = set()
    for axes, (kind, by_layer) in zip(figure.subplots(1, 2), maps.items(), strict=True):
        widest = max(states_XR.shape[1] for states_XR in by_layer.values())
        all_states = np.full((sum(map(len, by_layer.values())), widest), np.nan)
        start, middles = 0, []
        for states_XR in by_layer.values():
            all_states[start : start + len(states_XR), : states_XR.shape[1]] = states_XR
            middles.append(start + (len(states_XR) - 1) / 2)
            start += len(states_XR)
            axes.axhline(start - 0.5, color="white", linewidth=1.5)
        palette = ListedColormap(list(colours.values()))
        axes.imshow(all_states, cmap=palette, vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
        shown = range(0, len(middles), math.ceil(len(middles) / 40))
        axes.set_yticks([middles[number] for number in shown], [str(list(by_layer)[number]) for number in shown])
        axes.set(xlabel=f"{kind} channel of a head", ylabel=f"layer, a row a {kind} head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_title(f"{kind} channels: {np.nansum(all_states == 1):,} of {np.isfinite(all_states).sum():,} kept")
        seen |= set(all_states[np.isfinite(all_states)])
    handles = [
        Patch(facecolor=colour, label=name) for state, (name, colour) in enumerate(colours.items()) if state in seen
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def draw_filters(layer: int, filters: Mapping[str, np.ndarray], kept: Kept | None = None) -> Figure:
    """Draw the convolution kernels of one layer: channels across, taps down, head under head.

    ``filters`` has the kernels ``[X, R, K]`` by the name of their convolution, the oldest token's tap first. Where
    ``kept`` is given, a black bar above the taps of a channel says that it was kept.
    """
    taps = max(kernels_XRK.shape[2] for kernels_XRK in filters.values())
    rows = max(len(kernels_XRK) for kernels_XRK in filters.values()) * (taps + 2)
    top = max(np.abs(kernels_XRK).max() for kernels_XRK in filters.values())
    widths = [1.8 if kernels_XRK.shape[1] == 1 else 4.2 for kernels_XRK in filters.values()]
    figure = Figure(figsize=(max(7, sum(widths) + 1.2), min(12, max(2.0, 0.1 * rows)) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(filters), squeeze=False, width_ratios=widths)[0]
    is_marked = False
    for axes, (name, kernels_XRK) in zip(panels, filters.items(), strict=True):
        X, R, K = kernels_XRK.shape
        # The rows of a head: a bar that marks the kept channels, its taps, and an empty one.
        picture = np.full((X, K + 2, R), np.nan)
        picture[:, 1 : K + 1] = kernels_XRK.swapaxes(1, 2)
        style = dict(aspect="auto", interpolation="nearest")
        axes.imshow(picture.reshape(-1, R), cmap="PuOr", vmin=-top, vmax=top, **style)
        marks = _marks(name, R, kept)
        if marks is not None:
            bars = np.full((X, K + 2, R), np.nan)
            bars[:, 0] = np.where(marks, 1.0, np.nan)
            axes.imshow(bars.reshape(-1, R), cmap=ListedColormap([BLACK]), **style)
            is_marked = True
        axes.set_facecolor(PALE)
        axes.set(title=f"convolution of {' and '.join(name)}", xlabel="channel of a head", ylabel="head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_yticks([(K + 2) * head + (K + 1) / 2 for head in range(X)], [str(head) for head in range(X)])
        if R == 1:
            axes.set(xticks=[], xlabel="all channels alike", ylim=(rows - 0.5, -0.5))
        if R == 1 and X == 1:
            axes.set(yticks=[], ylabel="all heads alike")
    figure.colorbar(panels[0].images[0], ax=panels, label="weight", pad=0.02, aspect=30)
    title = f"layer {layer}: the taps of each head, from the oldest token's (top) to the newest's"
    figure.suptitle(title + ("; black bar: channel kept" if is_marked else ""), fontsize="medium")
    return figure


def _layers(models: Sequence[Mapping]) -> list[int]:
    return sorted({entry["layer"] for model in models for entry in model["layers"]})


def _whole_ticks(axes: Axes, labels: Sequence[int], *, axis: str) -> None:
    """Label the positions 0, 1, ... of an axis; where labels would overlap, every second or third."""
    places = range(0, len(labels), math.ceil(len(labels) / 32))
    getattr(axes, f"set_{axis}ticks")(list(places), [str(labels[place]) for place in places])


def _states(kind: str, kept: Kept) -> np.ndarray:
    """Return for each dense head and channel ``[X, R]``: 0 removed, 1 kept, 2 of a removed head, 3 projected."""
    is_key, sizes = kind == "key", kept.before
    heads, channels = (kept.key_heads, kept.key) if is_key else (kept.value_heads, kept.value)
    shape = (sizes.key_heads, sizes.head_k_dim) if is_key else (sizes.value_heads, sizes.head_v_dim)
    states_XR = np.full(shape, 2.0)
    for place, head in enumerate(heads):
        states_XR[head] = 3 if channels is None else 0
        if channels is not None:
            states_XR[head, channels[place]] = 1
    return states_XR


def _marks(name: str, num_channels: int, kept: Kept | None) -> np.ndarray | None:
    """Return which channels ``[X, R]`` of a convolution are kept; None where single channels are not distinguished."""
    if kept is None or num_channels == 1:
        return None
    states_XR = _states("value" if name == "v" else "key", kept)
    return None if (states_XR == 3).any() else states_XR == 1

"""Pictures of the stable rank of states, and of what pruning kept: figures of matplotlib, to be saved as PNG.

Ranks are drawn as they are. As a share of the smaller side of the state (:mod:`keyreduce.evaluation.rank`) they would
rise with every cut, since the side gets smaller.

Shapes: L layers, W value heads, P positions, X heads, R channels, K taps.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from keyreduce import drawing
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.filters import filters_of
from keyreduce.evaluation.kept import Kept
from keyreduce.families import family_of
from keyreduce.outputs import appearing

_OURS = re.compile(r"(rank-heat-map|rank-curves|kept-channels|filters-layer-\d+)\.png")
# In the order of the states; they differ in how light they are too.
_COLOURS = {
    "removed": drawing.PALE,
    "kept": drawing.BLUE,
    "head removed": drawing.BLACK,
    "projected together": drawing.ORANGE,
}


def refuse_other_files(folder: Path) -> None:
    """Raise a KeyreduceError if a folder, which is replaced as a whole, holds other files than our pictures."""
    others = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)) if folder.is_dir() else []
    if others:
        raise KeyreduceError(
            f"{folder} holds other files, such as {others[0]!r}, and pictures would replace it; give another folder"
        )


def draw_folder(folder: Path, report: Mapping, kept: Mapping[int, Kept], dense: Checkpoint) -> list[str]:
    """Draw all pictures of a report of :mod:`keyreduce.api.rank`, and return their names.

    The folder appears whole or not at all, and replaces an earlier one; a KeyreduceError says that it cannot be
    written. ``kept`` has what pruning kept of each layer; it is empty where that is not known. The convolution kernels
    are those of the ``dense`` checkpoint.
    """
    name = _names(report)
    with appearing(folder, folder=True, overwrite=True) as temporary:

        def save(figure: Figure, name: str) -> None:
            drawing.save_picture(figure, temporary / f"{name}.png")

        save(draw_heat_map(report), "rank-heat-map")
        save(draw_curves(report), "rank-curves")
        if kept:
            save(draw_kept_channels(name, kept), "kept-channels")
        for layer in family_of(dense.config).mixer_layers(dense.config):
            filters = {name: kernels.numpy() for name, kernels in filters_of(dense, layer).items()}
            if filters:
                title = f"{dense.path.name}, layer {layer}"
                save(draw_filters(title, filters, kept.get(layer)), f"filters-layer-{layer:02}")
        return sorted(path.name for path in temporary.iterdir())


def draw_heat_map(report: Mapping) -> Figure:
    """Draw the stable rank of each layer and head, the mean over positions; models side by side, on one scale.

    The report is that of :mod:`keyreduce.api.rank`: of its ``models`` each has a ``label``, and ``layers`` with
    ``layer``, the sizes of a head, ``heads`` (their numbers in the dense model) and ``utilisation``.
    """
    models = report["models"]
    layers = _layers(models)
    heads = 1 + max(head for model in models for entry in model["layers"] for head in entry["heads"])
    maps = []
    for model in models:
        rank_LW = np.full((len(layers), heads), np.nan)
        for entry in model["layers"]:
            rank_LW[layers.index(entry["layer"]), entry["heads"]] = _ranks(entry).mean(axis=1)
        maps.append(rank_LW)
    top = max(np.nanmax(rank_LW) for rank_LW in maps)
    cell = min(0.4, 9 / heads)
    width, height = max(2.6, cell * heads), max(1.6, 0.26 * len(layers))
    title = f"{_names(report)}: stable rank of the states"
    figure = drawing.new_figure(max(7.5, len(maps) * (width + 0.6) + 1.1), height + 1.4, title, about=_about(report))
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    for axes, model, rank_LW in zip(panels, models, maps, strict=True):
        axes.patch.set(hatch="////", edgecolor="0.6")
        axes.imshow(rank_LW, cmap="cividis", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
        axes.set_title(f"{model['label']}, states of {_sizes(model)}", fontsize="medium")
        axes.set(xlabel="value head")
        _whole_ticks(axes, range(heads), axis="x")
        for (row, column), rank in np.ndenumerate(rank_LW):
            if cell >= 0.38 and np.isfinite(rank):
                # The map is dark at its low end.
                colour = "white" if rank < 0.55 * top else "black"
                axes.text(column, row, f"{rank:.1f}", ha="center", va="center", fontsize=6.5, color=colour)
    panels[0].set_ylabel("layer")
    _whole_ticks(panels[0], layers, axis="y")
    label = "stable rank,\nmean along the sequence"
    figure.colorbar(panels[0].images[0], ax=panels, label=label, pad=0.02, aspect=30)
    if any(np.isnan(rank_LW).any() for rank_LW in maps):
        drawing.legend(figure, [Patch(facecolor="white", hatch="////", edgecolor="0.6", label="no such head")])
    return figure


def draw_curves(report: Mapping) -> Figure:
    """Draw the stable rank along the sequence, one panel for each layer: the mean over its heads, and their range.

    The report is as :func:`draw_heat_map` takes it, with the ``positions`` in tokens; of two models at most.
    """
    positions, models = report["positions"], report["models"]
    layers = _layers(models)
    columns = min(6, math.ceil(math.sqrt(len(layers))))
    rows = math.ceil(len(layers) / columns)
    title = f"{_names(report)}: stable rank of the states along the sequence"
    figure = drawing.new_figure(max(7.5, 2.3 * columns + 0.4), 1.7 * rows + 1.0, title, about=_about(report))
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    looks = [drawing.lined(number) | {"markersize": 4} for number in range(len(models))]
    for axes, layer in zip(panels, layers, strict=False):
        for model, look in zip(models, looks, strict=True):
            for entry in model["layers"]:
                if entry["layer"] == layer:
                    rank_WP = _ranks(entry)
                    low_P, high_P = rank_WP.min(axis=0), rank_WP.max(axis=0)
                    axes.fill_between(positions, low_P, high_P, color=look["color"], alpha=0.2, linewidth=0)
                    axes.plot(positions, rank_WP.mean(axis=0), **look)
        drawing.finish(axes, title=f"layer {layer}", x="", y="")
    for axes in panels[::columns]:
        axes.set_ylabel("stable rank")
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(layers) - columns) : len(layers)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("tokens read")
    top = max(_ranks(entry).max() for model in models for entry in model["layers"])
    panels[0].set(xlim=(0, None), ylim=(0, top * 1.1))
    handles = [
        Line2D([], [], **dict[str, Any](look), label=f"{model['label']} ({_sizes(model)}): mean of the heads")
        for model, look in zip(models, looks, strict=True)
    ] + [Patch(facecolor="0.5", alpha=0.3, label="range of the heads")]
    drawing.legend(figure, handles)
    return figure


def draw_kept_channels(name: str, kept: Mapping[int, Kept]) -> Figure:
    """Draw which key and value channels of the dense model are kept: one row for each head, layer by layer.

    ``name`` is what the title calls the model.
    """
    maps = {kind: {layer: _states(kind, one) for layer, one in kept.items()} for kind in ("key", "value")}
    rows = max(sum(len(states_XR) for states_XR in by_layer.values()) for by_layer in maps.values())
    title = f"{name}: what is kept of each head"
    figure = drawing.new_figure(11, min(14, max(2.0, 0.16 * rows)) + 1.3, title)
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
        palette = ListedColormap(list(_COLOURS.values()))
        axes.imshow(all_states, cmap=palette, vmin=-0.5, vmax=3.5, aspect="auto", interpolation="nearest")
        shown = range(0, len(middles), math.ceil(len(middles) / 40))
        axes.set_yticks([middles[number] for number in shown], [str(list(by_layer)[number]) for number in shown])
        axes.set(xlabel=f"{kind} channel of a head", ylabel=f"layer, a row a {kind} head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_title(_kept_of_a_head(kind, kept.values()), fontsize="medium")
        seen |= set(all_states[np.isfinite(all_states)])
    drawing.legend(
        figure,
        [Patch(facecolor=colour, label=name) for state, (name, colour) in enumerate(_COLOURS.items()) if state in seen],
    )
    return figure


def draw_filters(title: str, filters: Mapping[str, np.ndarray], kept: Kept | None = None) -> Figure:
    """Draw the convolution kernels of one layer: channels across, taps down, head under head.

    ``filters`` has the kernels ``[X, R, K]`` by the name of their convolution, the oldest token's tap first; each has a
    scale of its own. Where ``kept`` is given, a black bar above the taps of a channel says that it was kept. ``title``
    names model and layer.
    """
    taps = max(kernels_XRK.shape[2] for kernels_XRK in filters.values())
    rows = max(len(kernels_XRK) for kernels_XRK in filters.values()) * (taps + 2)
    widths = [2.2 if kernels_XRK.shape[1] == 1 else 4.8 for kernels_XRK in filters.values()]
    marks_of = {name: _marks(name, kernels_XRK.shape[1], kept) for name, kernels_XRK in filters.items()}
    title += ": convolution kernels, the oldest token's tap of each head on top"
    about = "black bar: channel kept" if any(marks is not None for marks in marks_of.values()) else ""
    figure = drawing.new_figure(max(7.5, sum(widths)), min(12, max(2.0, 0.1 * rows)) + 1.3, title, about=about)
    panels = figure.subplots(1, len(filters), squeeze=False, width_ratios=widths)[0]
    for axes, (name, kernels_XRK) in zip(panels, filters.items(), strict=True):
        X, R, K = kernels_XRK.shape
        top = np.abs(kernels_XRK).max()
        # The rows of a head: a bar that marks the kept channels, its taps, and an empty one.
        picture = np.full((X, K + 2, R), np.nan)
        picture[:, 1 : K + 1] = kernels_XRK.swapaxes(1, 2)
        style = dict(aspect="auto", interpolation="nearest")
        axes.imshow(picture.reshape(-1, R), cmap="PuOr", vmin=-top, vmax=top, **style)
        marks = marks_of[name]
        if marks is not None:
            bars = np.full((X, K + 2, R), np.nan)
            bars[:, 0] = np.where(marks, 1.0, np.nan)
            axes.imshow(bars.reshape(-1, R), cmap=ListedColormap([drawing.BLACK]), **style)
        axes.set_facecolor(drawing.PALE)
        axes.set(xlabel="channel of a head", ylabel="head")
        axes.set_title(f"convolution of {' and '.join(name)}", fontsize="medium")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.set_yticks([(K + 2) * head + (K + 1) / 2 for head in range(X)], [str(head) for head in range(X)])
        if R == 1:
            axes.set(xticks=[], xlabel="all channels alike", ylim=(rows - 0.5, -0.5))
        if R == 1 and X == 1:
            axes.set(yticks=[], ylabel="all heads alike")
        figure.colorbar(axes.images[0], ax=axes, label="weight", pad=0.02, aspect=20)
    return figure


def _names(report: Mapping) -> str:
    """Return what titles call the models of a report: the folder of the dense one, and of the one beside it."""
    first, *others = [Path(model["folder"]).name for model in report["models"]]
    return " and ".join([first, *(name for name in others if name != first)])


def _about(report: Mapping) -> str:
    sequences, tokens = report["models"][-1]["sequences"], report["positions"][-1]
    return drawing.joined(
        f"{sequences:,} sequences of {tokens:,} tokens", drawing.text_words(report["text"]), report["device"]
    )


def _ranks(entry: Mapping) -> np.ndarray:
    """Return the stable ranks ``[W, P]`` of a layer."""
    return np.array(entry["utilisation"]) * min(entry["head_k_dim"], entry["head_v_dim"])


def _sizes(model: Mapping) -> str:
    """Return the sizes of a model's states, K x V."""
    pairs = sorted({(entry["head_k_dim"], entry["head_v_dim"]) for entry in model["layers"]})
    smallest, largest = f"{pairs[0][0]} x {pairs[0][1]}", f"{pairs[-1][0]} x {pairs[-1][1]}"
    return smallest if smallest == largest else f"{smallest} to {largest}"


def _kept_of_a_head(kind: str, kept: Iterable[Kept]) -> str:
    """Return in words how many channels of a head are kept, and how many heads."""
    kept, channels, heads = list(kept), f"head_{kind[0]}_dim", f"{kind}_heads"
    sides = [one.before for one in kept], [one.after for one in kept]
    before, after = (_span(getattr(sizes, channels) for sizes in side) for side in sides)
    if kind == "key" and any(one.key is None for one in kept):
        words = f"{before} projected onto {after}"
    else:
        words = f"all {before} kept" if before == after else f"{after} of {before} kept"
    before, after = (_span(getattr(sizes, heads) for sizes in side) for side in sides)
    return f"{kind} channels of a head: {words}" + (f"; {after} of {before} {kind} heads" if before != after else "")


def _span(numbers: Iterable[int]) -> str:
    """Return a number that is the same everywhere, or the smallest and the largest one."""
    few = sorted(set(numbers))
    return f"{few[0]}" if len(few) == 1 else f"{few[0]} to {few[-1]}"


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

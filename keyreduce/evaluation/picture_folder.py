"""The folder of pictures that ``keyreduce rank`` draws."""

import re
from collections.abc import Mapping
from pathlib import Path

from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.evaluation.filters import filters_of
from keyreduce.evaluation.kept import Kept
from keyreduce.evaluation.pictures import draw_curves, draw_filters, draw_heat_map, draw_kept_channels, save
from keyreduce.families import family_of
from keyreduce.outputs import appearing

_OURS = re.compile(r"(rank-heat-map|rank-curves|kept-channels|filters-layer-\d+)\.png")


def refuse_other_files(folder: Path) -> None:
    """Refuse a folder that holds other files than the pictures of ``keyreduce rank``: it is replaced as a whole.

    Raises:
        KeyreduceError: there is such a file.
    """
    others = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name)) if folder.is_dir() else []
    if others:
        raise KeyreduceError(
            f"{folder} holds other files, such as {others[0]!r}, and pictures would replace it; give another folder"
        )


def draw_folder(folder: Path, report: Mapping, kept: Mapping[int, Kept], dense: Checkpoint) -> list[str]:
    """Draw all pictures of a report; the folder appears whole or not at all, and replaces an earlier one.

    Args:
        folder: the folder to make.
        report: ``positions`` and ``models``, as :mod:`keyreduce.evaluation.pictures` takes them.
        kept: layer -> what pruning kept of the dense model; empty where that is not known.
        dense: the checkpoint whose convolution kernels are drawn.

    Returns:
        The names of the files.

    Raises:
        KeyreduceError: the folder cannot be written.
    """
    with appearing(folder, folder=True, overwrite=True) as temporary:
        save(draw_heat_map(report["models"]), temporary / "rank-heat-map.png")
        save(draw_curves(report["positions"], report["models"]), temporary / "rank-curves.png")
        if kept:
            save(draw_kept_channels(kept), temporary / "kept-channels.png")
        for layer in family_of(dense.config).mixer_layers(dense.config):
            filters = {name: kernels.numpy() for name, kernels in filters_of(dense, layer).items()}
            if filters:
                save(draw_filters(layer, filters, kept.get(layer)), temporary / f"filters-layer-{layer:02}.png")
        names = sorted(path.name for path in temporary.iterdir())
    return names

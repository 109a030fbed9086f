"""``keyreduce sweep``: a table of methods and ratios, measured."""

from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="What to compare: a .toml, as in configs/sweep.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH|NAME", help="Models to prune; may be repeated.", show_default="those of the recipe"
        ),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER", help="Text for calibration.", show_default="the Python standard library's source"
        ),
    ] = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE|FOLDER", help="Text to measure on.", show_default="another part of that"),
    ] = None,
    work: options.Work = options.DEFAULT_WORK,
    output: options.Figures = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Prune models in every way of a recipe, measure each on held-out text, and print the table.

    A model is calibrated once for all methods; pruned checkpoints are not kept.
    """
    from dataclasses import replace

    from keyreduce.cli.console import Console
    from keyreduce.data.text import text_source
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.sweep.recipe import read_recipe
    from keyreduce.sweep.run import run_sweep
    from keyreduce.workspace import Workspace, refuse_existing, refuse_unwritable, write_json

    console, workspace = Console(as_json=json), Workspace(work)
    target = output or workspace.sweep
    refuse_existing(target, overwrite)
    refuse_unwritable(target, folder=False)
    chosen = read_recipe(recipe)
    if model:
        chosen = replace(chosen, models=model)
    device = pick_device(device)
    steps = len(chosen.models) * (len(chosen.cells) + 1)
    with console.progress("measuring", steps, "models") as progress:
        report = run_sweep(
            chosen,
            calibration=text_source(calibration or (), default="calibration"),
            heldout=text_source(heldout or (), default="heldout"),
            seed=seed,
            device=device,
            dtype=pick_dtype(dtype, device),
            progress=progress,
        )
    write_json(target, report, overwrite=overwrite)
    for entry in report["models"]:
        _print(console, entry)
    console.say(f"wrote {target}")
    console.result(report)


def _print(console, entry: dict) -> None:
    """One table a target: a row for each method, a column for each ratio."""
    for target in dict.fromkeys(cell["target"] for cell in entry["cells"]):
        cells = [cell for cell in entry["cells"] if cell["target"] == target]
        ratios = sorted({cell["ratio"] for cell in cells})
        figure = {(cell["label"], cell["ratio"]): f"{cell['bits_per_byte']:.3f}" for cell in cells}
        console.table(
            f"{Path(entry['model']).name}, bits per byte by share of {target} removed "
            f"(dense: {entry['bits_per_byte']:.3f})",
            ("", *(f"{100 * ratio:g}%" for ratio in ratios)),
            [
                (label, *(figure.get((label, ratio), "") for ratio in ratios))
                for label in dict.fromkeys(cell["label"] for cell in cells)
            ],
        )

"""``keyreduce sweep``: models pruned in every way of a recipe, timed and measured."""

from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options

_RUNS = "How it runs"


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="What to compare: a .toml, as in configs/sweep.")],
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH|NAME", help="Models to prune; may be repeated.", show_default="those of the recipe"),
    ] = None,
    calibration: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Text for calibration and repair; may be repeated.",
            show_default="the Python standard library's source",
        ),
    ] = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER", help="Text to measure on; may be repeated.", show_default="another part of that"
        ),
    ] = None,
    work: options.Work = options.DEFAULT_WORK,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The folder of the sweep.", show_default="sweep in --work"),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seeds; may be repeated.", show_default="those of the recipe"),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    engine: Annotated[
        str,
        typer.Option(metavar="processes|ray", rich_help_panel=_RUNS, help="This machine, or a Ray cluster (an extra)."),
    ] = "processes",
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=_RUNS,
            help="Processes at a time. On a CPU they take time from each other, and what is timed says so.",
            show_default="one for each GPU, else one",
        ),
    ] = None,
    keep_checkpoints: Annotated[
        bool,
        typer.Option("--keep-checkpoints", rich_help_panel=_RUNS, help="Leave the pruned models in the runs' folders."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_RUNS, help="Do also the runs that are done.")
    ] = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Prune models in every way of a recipe, time and measure each, and write the tables and pictures.

    Each run has a folder. A sweep that was stopped, or has a longer recipe now, goes on where it was: what is done is
    not done again. A run that fails is told at the end, and leaves the others alone; the exit code is 1 then.
    """
    from dataclasses import replace

    from keyreduce.cli.console import Console
    from keyreduce.cli.table import write_and_print
    from keyreduce.data.text import text_source
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.outputs import refuse_unwritable
    from keyreduce.sweep.engines import engine_named
    from keyreduce.sweep.recipe import check_seeds, read_recipe
    from keyreduce.sweep.record import SWEEP_NAME
    from keyreduce.sweep.run import plan_sweep, run_sweep
    from keyreduce.workspace import Workspace

    console = Console(as_json=json)
    target = output or Workspace(work).root / "sweep"
    refuse_unwritable(target / SWEEP_NAME, folder=False)
    chosen = read_recipe(recipe)
    chosen = replace(chosen, models=model or chosen.models, seeds=seed or chosen.seeds)
    check_seeds(chosen.seeds, "--seed")
    place = pick_device(device)
    texts = {
        "calibration": text_source(calibration or (), default="calibration"),
        "heldout": text_source(heldout or (), default="heldout"),
    }
    kind = pick_dtype(dtype, place)
    runs = plan_sweep(chosen, target, device=place, dtype=kind, **texts)
    run_jobs, workers = engine_named(engine, jobs=jobs, device=str(place))
    about = {
        "recipe": str(recipe),
        "device": str(place),
        "dtype": str(kind).removeprefix("torch."),
        "engine": engine,
        "jobs": workers,
        "calibration": {
            "text": texts["calibration"].describe(),
            **chosen.calibration._asdict(),
            "seed": chosen.seeds if chosen.per_seed else chosen.seeds[:1],
        },
        "heldout": {"text": texts["heldout"].describe(), **chosen.heldout._asdict()},
        "timing": chosen.timing and chosen.timing._asdict(),
    }
    about["heldout"].pop("seed")
    with console.progress("sweeping", len(runs), "runs") as progress:
        failures = run_sweep(
            runs,
            target,
            about=about,
            engine=run_jobs,
            workers=workers,
            keep_checkpoints=keep_checkpoints,
            again=overwrite,
            progress=_told(console, progress, len(runs)),
        )
    result = write_and_print(console, target, target)
    for failure in failures:
        console.note(f"failed: {failure.run.title}: {failure.message} (see {target / failure.run.folder / 'log.txt'})")
    console.result(result)
    if failures:
        raise typer.Exit(1)


def _told(console, progress, total: int):
    """Return a function that feeds the bar, and where nobody watches one, as in a log, says how far it is."""
    ended = 0

    def tell(amount: int) -> None:
        nonlocal ended
        ended += amount
        progress(amount)
        if not console.errors.is_terminal:
            console.note(f"{ended} of {total} runs have ended")

    return tell

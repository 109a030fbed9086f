"""The requests of ``keyreduce sweep`` and ``keyreduce table``, and what carries them out."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyreduce.api import options
from keyreduce.api.request import Request, Result, option
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    from keyreduce.sweep.results import Results


QUICK = Path("quick")
"""The recipe of a sweep that names none, by its name."""


def _text(help: str, shown_default: str) -> Any:
    words = {"metavar": "FILE|FOLDER", "shown_default": shown_default}
    return option((), help=f"{help}; may be repeated.", **words, **options.TEXT)


@dataclass(frozen=True, kw_only=True)
class SweepRequest(Request):
    """Prune models in every way of a recipe, time and measure each, and write the tables and pictures.

    Each run has a folder. A sweep that was stopped, or has a longer recipe now, resumes where it was: what is done is
    not done again. A run that fails is reported at the end and does not stop the others; the exit code is 1 then.
    """

    recipe: Path | None = option(
        None,
        help="What to compare: a .toml file, or a recipe that ships, such as quick.",
        metavar="RECIPE",
        is_argument=True,
        panel="Model",
        shown_default="quick: three methods at three ratios on the shipped models",
    )
    model: tuple[str, ...] = option(
        (),
        help="Models to prune; may be repeated.",
        metavar="PATH|NAME",
        shown_default="those of the recipe",
        flags=options.MODEL_FLAGS,
        panel="Model",
    )
    calibration: tuple[Path, ...] = _text("Text for calibration and repair", "the Python standard library's source")
    heldout: tuple[Path, ...] = _text("Text to measure on", "another part of that source")
    work: Path = options.work()
    output: Path | None = options.output("The folder of the sweep.", shown_default="sweep in --work")
    seed: tuple[int, ...] = option(
        (), help="Seeds; may be repeated.", shown_default="those of the recipe", minimum=0, maximum=options.MOST_SEED
    )
    device: str | None = options.device("cpu, cuda, ...")
    dtype: options.Dtype | None = options.dtype()
    launcher: Literal["processes", "ray"] = option(
        "processes",
        help="What starts the processes: this machine, or a Ray cluster (an extra).",
        **options.HARDWARE,
        flags=("--launcher", "--engine"),
    )
    jobs: int | None = option(
        None,
        help="Processes at a time. On a CPU they take time from each other, and notes on what is timed say so.",
        **options.HARDWARE,
        minimum=1,
        shown_default="one for each GPU, else one",
    )
    keep_checkpoints: bool = option(False, help="Leave the pruned models in the runs' folders.", **options.OUTPUT)
    overwrite: bool = option(False, help="Repeat the runs that are done.", **options.OUTPUT)


@dataclass(frozen=True, kw_only=True)
class TableRequest(Request):
    """Print a sweep's table, and write it as Markdown, CSV, LaTeX (booktabs) and a page with pictures.

    A picture shows perplexity against the share removed, another against speed, with the Pareto front.
    """

    folder: Path | None = option(
        None,
        help="The folder of a sweep, finished or not.",
        metavar="DIR",
        is_argument=True,
        panel="Model",
        shown_default="sweep in --work",
    )
    work: Path = options.work()
    output: Path | None = options.output("Where to write.", shown_default="the folder of the sweep")
    overwrite: bool = option(False, help="Replace what is at --output.", **options.OUTPUT)


@dataclass(frozen=True, kw_only=True)
class SweepResult(Result):
    """What a sweep has found, its folder, and the files that show it.

    Attributes:
        failures: title -> why, and where its log is, of the runs of this sweep that have no result.
    """

    sweep: Path
    written: list[Path]
    results: "Results"
    failures: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict:
        """Return the folder, the files, and all numbers: see :meth:`keyreduce.sweep.results.Results.to_json`."""
        return {"sweep": str(self.sweep), "written": list(map(str, self.written)), **self.results.to_json()}


def sweep(request: SweepRequest, reporter: Reporter = Reporter()) -> SweepResult:
    """Do the runs of a recipe that are not done yet, and write the tables.

    Raises:
        KeyreduceError: the recipe holds what cannot be, the texts overlap, another sweep is at work in the folder or it
            holds something else, no run has a result, or a file cannot be written.
    """
    from keyreduce.api.tasks import LOG_NAME
    from keyreduce.data.text import text_source
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.outputs import refuse_unwritable
    from keyreduce.sweep.launchers import launcher_named
    from keyreduce.sweep.recipe import check_seeds, read_recipe, sizes_of
    from keyreduce.sweep.results import SWEEP_NAME
    from keyreduce.sweep.run import plan_sweep, run_sweep
    from keyreduce.workspace import Workspace

    recipe = read_recipe(request.recipe or QUICK)
    recipe = replace(recipe, models=request.model or recipe.models, seeds=request.seed or recipe.seeds)
    check_seeds("seed", recipe.seeds)
    device = pick_device(request.device)
    where = {"device": str(device), "dtype": str(pick_dtype(request.dtype, device)).removeprefix("torch.")}
    calibration = text_source(request.calibration, default="calibration")
    heldout = text_source(request.heldout, default="heldout")
    root = Path(os.path.realpath(request.output or Workspace(request.work).sweep))
    refuse_unwritable(root / SWEEP_NAME, folder=False)
    runs = plan_sweep(recipe, root, calibration=calibration, heldout=heldout, **where)
    launch, workers = launcher_named(request.launcher, jobs=request.jobs, device=str(device))
    drawn, timing = recipe.seeds if recipe.per_seed else recipe.seeds[:1], recipe.benchmark
    timed = ("kinds", "batch_size", "rounds", "decode_batch_sizes")
    about = {
        "recipe": str(recipe.path),
        **where,
        "calibration": {"text": calibration.describe(), **sizes_of(recipe.calibration), "seed": [*drawn]},
        "heldout": {"text": heldout.describe(), **sizes_of(recipe.heldout)},
        "timing": timing and {**{name: getattr(timing, name) for name in timed}, "seq_len": max(timing.seq_len)},
        "launcher": request.launcher,
        "jobs": workers,
    }
    reporter.keep(f"the runs in {root} that have ended; the same command does the others")
    with reporter.progress("sweeping", len(runs), "runs") as progress:
        failures = run_sweep(
            runs,
            root,
            about=about,
            launch=launch,
            workers=workers,
            keep_checkpoints=request.keep_checkpoints,
            again=request.overwrite,
            progress=progress,
        )
    failed = [run for run in runs if run.folder in failures]
    told = {run.title: f"{failures[run.folder]} (see {root / run.folder / LOG_NAME})" for run in failed}
    return _report(root, root, told)


def table(request: TableRequest, reporter: Reporter = Reporter()) -> SweepResult:
    """Write the tables and pictures of what a sweep has so far.

    Raises:
        KeyreduceError: there is no sweep, a file of it is damaged, no run has a result, or a file exists or cannot be
            written.
    """
    from keyreduce.outputs import refuse_existing
    from keyreduce.sweep.report import NAMES
    from keyreduce.workspace import Workspace

    source = request.folder or Workspace(request.work).sweep
    if request.output is not None:
        for name in NAMES:
            refuse_existing(request.output / name, request.overwrite)
    return _report(source, request.output or source)


def _report(source: Path, target: Path, failures: Mapping[str, str] | None = None) -> SweepResult:
    from keyreduce.sweep.report import write_report
    from keyreduce.sweep.results import read_results

    results = read_results(source)
    return SweepResult(sweep=source, written=write_report(results, target), results=results, failures=failures or {})

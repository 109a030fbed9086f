"""``keyreduce eval --tasks``: lm-evaluation-harness on the models that eval compares."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from keyreduce.cli.console import Console
    from keyreduce.evaluation.harness import Tasks as FoundTasks
    from keyreduce.models.loading import LoadedModel


def _above_zero(limit: float | None) -> float | None:
    if limit is not None and not 0 < limit < math.inf:
        raise typer.BadParameter("it must be above 0")
    return limit


_PANEL = "Tasks of lm-evaluation-harness"
Tasks = Annotated[
    str | None,
    typer.Option(
        envvar="TASKS",
        metavar="NAME,...",
        rich_help_panel=_PANEL,
        help="Run these too: names, patterns or .yaml files; 'paper' is wikitext, lambada_openai, piqa, hellaswag, "
        "winogrande, arc_easy and arc_challenge.",
    ),
]
IncludePath = Annotated[
    Path | None, typer.Option(metavar="DIR", rich_help_panel=_PANEL, help="A folder with tasks of your own.")
]
NumFewshot = Annotated[
    int | None,
    typer.Option(
        min=0, metavar="N", rich_help_panel=_PANEL, help="Examples before a question.", show_default="the task's own"
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(
        callback=_above_zero,
        metavar="N",
        rich_help_panel=_PANEL,
        help="Only so many documents of each task, or that share of them where it is below 1.",
        show_default="all",
    ),
]


def find(tasks: str, include_path: Path | None) -> "FoundTasks":
    """Look up what ``--tasks`` names, before any model is loaded.

    Raises:
        KeyreduceError: the harness is not installed, or there is no such task.
    """
    from keyreduce.evaluation.harness import find_tasks

    return find_tasks([name.strip() for name in tasks.split(",") if name.strip()], include_path)


def results_file(output: Path, label: str) -> Path:
    """Return where the harness's results on a model go: beside the figures."""
    return output.with_name(f"{output.stem}-tasks-{label}.json")


def run(
    console: "Console",
    label: str,
    loaded: "LoadedModel",
    tasks: "FoundTasks",
    output: Path,
    *,
    num_fewshot: int | None,
    limit: float | None,
    batch_size: int,
) -> dict:
    """Run the tasks on a model, and write the harness's results beside ``output``.

    Returns:
        What to add to the model's entry in the figures: ``tasks``, the numbers, and ``tasks_file``.

    Raises:
        KeyreduceError: the harness stopped, or its results cannot be written.
    """
    from keyreduce.processes import command_line
    from keyreduce.evaluation.harness import figures, run_tasks, write_results
    from keyreduce.outputs import refuse_unwritable

    file = results_file(output, label)
    refuse_unwritable(file, folder=False)
    console.note(f"running {', '.join(tasks.names)} on {label}")
    results = run_tasks(
        loaded, tasks, num_fewshot=num_fewshot, limit=limit, batch_size=batch_size, command=command_line()
    )
    write_results(file, results, overwrite=True)
    return {"tasks": [figure._asdict() for figure in figures(results)], "tasks_file": str(file)}


def show(console: "Console", entries: list[dict]) -> None:
    """Print the figures of the entries' tasks: models side by side, and how the second differs from the first."""
    first, *others = (entry["label"] for entry in entries)
    rows = []
    for figures in zip(*(entry["tasks"] for entry in entries), strict=True):
        values = [figure["value"] for figure in figures]
        stderr = figures[0]["stderr"]
        row = [f"{figures[0]['task']} {figures[0]['metric']}", *map(_decimal, values), _decimal(stderr)]
        if others:
            row.append("" if None in values[:2] else f"{values[1] - values[0]:+.4f}")
        rows.append(row)
    header = ("", first, *others, f"± of {first}", *(["difference"] if others else []))
    console.table("lm-evaluation-harness", header, rows)


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}"

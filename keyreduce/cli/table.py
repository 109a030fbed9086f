"""``keyreduce table``: what a sweep has found, as tables, pictures and a page."""

from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options


def table(
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="The folder of a sweep, finished or not.", show_default="sweep in --work"),
    ] = None,
    work: options.Work = options.DEFAULT_WORK,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to write.", show_default="the folder of the sweep"),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Print a sweep's table, and write it as Markdown, CSV, LaTeX (booktabs) and a page with pictures.

    A picture shows perplexity against the share removed, another against speed, with the Pareto front.
    """
    from keyreduce.cli.console import Console
    from keyreduce.outputs import refuse_existing, refuse_unwritable
    from keyreduce.sweep.report import NAMES
    from keyreduce.workspace import Workspace

    console = Console(as_json=json)
    source = folder or Workspace(work).root / "sweep"
    if output is not None:
        for name in NAMES:
            refuse_unwritable(output / name, folder=False)
            refuse_existing(output / name, overwrite)
    console.result(write_and_print(console, source, output or source))


def write_and_print(console, source: Path, target: Path) -> dict:
    """Write the tables of the sweep in ``source`` into ``target``, print the first of them, and return all as JSON."""
    from keyreduce.sweep.report import write_report
    from keyreduce.sweep.results import read_results
    from keyreduce.sweep.tables import as_json, markdown

    results = read_results(source)
    written = write_report(results, target)
    console.say(markdown(results))
    console.say(f"wrote {', '.join(map(str, written))}")
    return {"sweep": str(source), "written": [str(path) for path in written], **as_json(results)}

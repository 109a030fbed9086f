"""``keyreduce sweep`` and ``table``: models pruned in every way of a recipe, timed and measured, and shown."""

import typer

from keyreduce.cli.console import Console
from keyreduce.sweep.request import SweepRequest, SweepResult, TableRequest, sweep, table


def show(request: SweepRequest, console: Console) -> None:
    """Do the sweep, print its first table, and say which runs failed."""
    result = sweep(request, console)
    _print_table(result, console)
    for title, why in result.failures.items():
        console.note(f"failed: {title}: {why}")
    console.finish(result)
    if result.failures:
        raise typer.Exit(1)


def show_table(request: TableRequest, console: Console) -> None:
    """Write the tables and pictures, and print the first of them."""
    result = table(request, console)
    _print_table(result, console)
    console.finish(result)


def _print_table(result: SweepResult, console: Console) -> None:
    """Print the tables as Markdown, and which files hold them."""
    from keyreduce.sweep.report import markdown

    console.say(markdown(result.results))
    console.say(f"wrote {', '.join(map(str, result.written))}")

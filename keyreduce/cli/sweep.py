"""``keyreduce sweep`` and ``table``: models pruned in every way of a recipe, timed and measured, and shown."""

import contextlib
from collections.abc import Callable, Iterator

import typer

from keyreduce.cli.console import Console
from keyreduce.reporting import Reporter
from keyreduce.sweep.request import SweepRequest, SweepResult, TableRequest, sweep, table


class _Counter(Reporter):
    """Says how far a sweep is where nobody watches a bar, as in a log."""

    def __init__(self, console: Console):
        self.note = console.note

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        ended = 0

        def advance(amount: int) -> None:
            nonlocal ended
            ended += amount
            if amount:
                self.note(f"{ended} of {total} {unit} have ended")

        yield advance


def show(request: SweepRequest, console: Console) -> None:
    """Do the sweep, print its first table, and say which runs failed."""
    result = sweep(request, console if console.errors.is_terminal else _Counter(console))
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

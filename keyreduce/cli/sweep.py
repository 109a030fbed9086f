"""``keyreduce sweep``: models pruned in every way of a recipe, timed and measured."""

import contextlib
from collections.abc import Callable, Iterator

import typer

from keyreduce.cli.console import Console
from keyreduce.cli.table import print_table
from keyreduce.reporting import Reporter
from keyreduce.sweep.request import SweepRequest, sweep


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
    print_table(result, console)
    for failure in result.failures:
        console.note(f"failed: {failure.title}: {failure.message} (see {failure.log})")
    console.finish(result)
    if result.failures:
        raise typer.Exit(1)

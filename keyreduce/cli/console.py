"""What commands print: tables for people on stdout, one JSON object for shells, and everything else on stderr."""

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence

from keyreduce.api.request import Result
from keyreduce.processes import Processes
from keyreduce.reporting import Reporter


class Console(Reporter):
    """What one command prints; under ``torchrun`` the first process alone prints.

    Args:
        as_json: whether stdout gets one JSON object, and tables go to stderr.
        is_quiet: whether remarks and progress stay out.
    """

    def __init__(self, *, as_json: bool, is_quiet: bool = False):
        from rich.console import Console as RichConsole

        self.as_json, self.is_quiet = as_json, is_quiet
        self.errors = RichConsole(stderr=True, highlight=False)
        self.tables = self.errors if as_json else RichConsole(highlight=False)
        self.errors.quiet = self.tables.quiet = Processes.of_torchrun().rank > 0

    def note(self, message: str) -> None:
        """Say something in passing, on stderr."""
        if not self.is_quiet:
            self.errors.print(message, markup=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """Print one line of the result."""
        self.tables.print(message, markup=False, soft_wrap=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table: the first column names, the others are figures."""
        from rich import box
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(header):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.tables.print(table)

    def finish(self, result: Result) -> None:
        """End a command: say what was uploaded or there already, and with ``--json`` print what a shell reads."""
        content = result.to_json()
        if content.get("pushed"):
            self.say(f"uploaded to {content['pushed']}")
        if not content.get("made", True):
            output = next(iter(content.values()))  # the field that such results have first
            self.say(f"{output} is there already, from the same inputs")
        if self.as_json:
            print(json.dumps(content))

    @contextlib.contextmanager
    def progress(self, description: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
        """Show a bar with rate and time left while the block runs; it is fed numbers of ``unit``."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        class Rate(TextColumn):
            def render(self, task):
                rate = task.finished_speed or task.speed
                return super().render(task) if rate is None else f"{scaled(rate)} {unit}/s"

        columns = ("[progress.description]{task.description}", BarColumn(), TaskProgressColumn(), Rate(""))
        # Where nobody watches, such as in a log, a bar would leave blank lines.
        hidden = self.is_quiet or not self.errors.is_terminal
        with Progress(*columns, TimeRemainingColumn(), console=self.errors, transient=True, disable=hidden) as bar:
            task = bar.add_task(description, total=total)
            yield lambda amount: bar.advance(task, amount)


def scaled(amount: float) -> str:
    """Return a number in three digits with a decimal prefix: 12300 is 12.3k."""
    for prefix in ("", "k", "M", "G"):
        if abs(amount) < 999.5:  # from there on three digits round to 1000
            return f"{amount:.3g}{prefix}"
        amount /= 1000
    return f"{amount:.4g}T"


def mebibytes(count: float) -> str:
    """Return bytes as MiB."""
    return f"{count / 2**20:,.2f} MiB"


def megabytes(count: int) -> str:
    """Return bytes as MB, the unit of files."""
    return f"{count / 1e6:,.1f} MB"

"""What commands print: tables for people on stdout, one JSON object for shells, and everything else on stderr."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence

from keyreduce.api.request import Result
from keyreduce.cli import errors
from keyreduce.processes import Processes
from keyreduce.reporting import Reporter

SECONDS_BETWEEN_LINES = 30
_PER = ((1, "s"), (60, "min"), (3600, "h"))


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

    def keep(self, what: str) -> None:
        """Remember what stays, to be said if the command is stopped."""
        errors.keep(what)

    def say(self, message: str) -> None:
        """Print one line of the result."""
        self.tables.print(message, markup=False, soft_wrap=True)

    def table(
        self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, whole: Sequence[str] = ()
    ) -> None:
        """Print a table: the first column names, the others are figures.

        With ``whole`` they are words, and the columns of these names are not broken into lines.
        """
        from rich import box
        from rich.table import Table

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
        for number, name in enumerate(header):
            justify = "left" if number == 0 or whole else "right"
            table.add_column(name, justify=justify, overflow="fold", no_wrap=name in whole)
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
        """Show a bar with rate and time left while the block runs; it is fed numbers of ``unit``.

        Where nobody watches, such as in a log, a line comes every half minute instead.
        """
        if self.is_quiet or not self.errors.is_terminal:
            yield (lambda amount: None) if self.is_quiet else _Lines(self.note, description, total, unit).advance
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        class Rate(TextColumn):
            def render(self, task):
                rate = task.finished_speed or task.speed
                return super().render(task) if rate is None else speed(rate, unit)

        columns = ("[progress.description]{task.description}", BarColumn(), TaskProgressColumn(), Rate(""))
        with Progress(*columns, TimeRemainingColumn(), console=self.errors, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda amount: bar.advance(task, amount)


class _Lines:
    """Progress as lines of a log: the share done, the speed and the time left, at most one every half minute."""

    def __init__(self, note: Callable[[str], None], description: str, total: int | None, unit: str):
        self.note, self.description, self.total, self.unit = note, description, total, unit
        self.done = 0
        self.begun = self.shown = time.monotonic()

    def advance(self, amount: int) -> None:
        """Count what is done, and print where the work stands if that was not said lately."""
        self.done += amount
        now = time.monotonic()
        if now - self.shown < SECONDS_BETWEEN_LINES:
            return
        self.shown, rate = now, self.done / (now - self.begun)
        words = [counted(self.done, self.unit)]
        if self.total:
            words = [f"{min(self.done / self.total, 1):.0%} of {counted(self.total, self.unit)}"]
        words.append(speed(rate, self.unit))
        if self.total and rate:
            left = round(max(self.total - self.done, 0) / rate)
            words.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        self.note(f"{self.description}: {', '.join(words)}")


def speed(rate: float, unit: str) -> str:
    """Return a speed in words: 123 MB/s, 12.3k tokens/s; below one a second by the minute or the hour."""
    seconds, per = next((one for one in _PER if rate * one[0] >= 1), _PER[-1])
    return f"{counted(rate * seconds, unit)}/{per}"


def counted(amount: float, unit: str) -> str:
    """Return a number in three digits with its unit: 12.3k tokens, but 123 MB."""
    number = scaled(amount)
    digits = number.rstrip("kMGT")
    return f"{digits} {number[len(digits) :]}B" if unit == "B" else f"{number} {unit}"


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

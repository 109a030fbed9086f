"""The help of a command: what it does, two examples, and its options in panels, in few enough lines to be read."""

import re
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

LABEL_WIDTH = 25
"""Columns for an option's name and the word for its value; what is longer takes two lines."""
_FIRST = ("Model", "What to cut", "What to measure", "How")
_LAST = ("Text", "Output", "Hardware")


class Command(TyperCommand):
    """A Typer command whose help is that of this module; its epilog is its examples, one a line."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help on stdout."""
        _print(self, ctx, [])


class Group(TyperGroup):
    """The same for the program itself: its help lists the commands."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help on stdout."""
        found: dict[str, list] = {}
        for name, command in self.commands.items():
            row = (name, (command.help or "").split("\n\n")[0], "")
            found.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(row)
        _print(self, ctx, [*found.items()], title="Options")


def _print(command: Any, context: Any, panels: list[tuple[str, list]], title: str | None = None) -> None:
    """Print usage, text, examples, ``panels``, and those of the options; with a ``title`` that is one."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(highlight=False)
    usage = ["Usage:", context.command_path, *command.collect_usage_pieces(context)]
    console.print(Text(" ".join(usage), style="bold"))
    for paragraph in (command.help or "").split("\n\n"):
        console.print(Padding(Text(" ".join(paragraph.split())), (1, 0, 0, 0)))
    console.print()
    for example in (command.epilog or "").splitlines():
        console.print(Text(f"  $ {example}", style="green"), soft_wrap=True)
    shown = [one for one in command.get_params(context) if not getattr(one, "hidden", False)]
    for heading, rows in panels + rows_by_panel(shown, title):
        console.print(_panel(heading, rows))


def rows_by_panel(parameters: Sequence[Any], title_of_all: str | None = None) -> list[tuple[str, list]]:
    """Return the titles of the panels and the rows of each: the common ones first and last, others between.

    A row is an option's names, what it means, and notes on its default and variable.
    """
    found: dict[str, list] = {}
    for parameter in parameters:
        own = "Output" if "--help" in parameter.opts else getattr(parameter, "rich_help_panel", None) or "How"
        title = title_of_all or own
        row = (_label(parameter), parameter.help or "", _notes(parameter))
        found.setdefault(title, []).append(row)
    others = [title for title in found if title not in (*_FIRST, *_LAST)]
    return [(title, found[title]) for title in (*_FIRST, *others, *_LAST) if title in found]


def _panel(title: str, rows: Sequence[tuple[str, str, str]]) -> Any:
    """Return a box of labels, each with what it means and notes."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(width=LABEL_WIDTH)
    table.add_column(ratio=1)
    for label, help, notes in rows:
        text = Text("\n".join(" ".join(paragraph.split()) for paragraph in help.split("\n\n")))
        table.add_row(Text(label, style="cyan"), text.append(f" [{notes}]" if notes else "", style="dim"))
    return Panel(table, title=title, title_align="left", border_style="dim", expand=True)


def _label(parameter: Any) -> str:
    """Return an option's names, short ones first, and the word for its value; a flag has none."""
    if parameter.param_type_name == "argument":
        return parameter.metavar or parameter.name.upper()
    names = [*sorted(parameter.opts, key=lambda name: (name.startswith("--"), name != parameter.opts[0]))]
    label = ", ".join([*names, *parameter.secondary_opts])
    return label if parameter.is_flag else f"{label} {parameter.metavar or ''}".rstrip()


def _notes(parameter: Any) -> str:
    """Return the default, and the variable that may give the value; all answer with ``KEYREDUCE_`` before them too."""
    notes, shown = [], getattr(parameter, "show_default", None)
    is_option = parameter.param_type_name == "option"
    if isinstance(shown, str):
        notes.append(f"default: {shown}")
    elif is_option and not parameter.is_flag and parameter.default not in (None, ()):
        notes.append(f"default: {parameter.default}")
    variables = [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or []
    if variables:
        notes.append(f"env: {min(variables, key=len)}")
    return re.sub(r"\s+", " ", "; ".join(notes))

"""``keyreduce table``: what a sweep has found, as tables, pictures and a page."""

from keyreduce.cli.console import Console
from keyreduce.sweep.request import SweepResult, TableRequest, table


def show(request: TableRequest, console: Console) -> None:
    """Write the tables and pictures, and print the first of them."""
    result = table(request, console)
    print_table(result, console)
    console.finish(result)


def print_table(result: SweepResult, console: Console) -> None:
    """Print the tables as Markdown, and which files hold them."""
    from keyreduce.sweep.tables import markdown

    console.say(markdown(result.results))
    console.say(f"wrote {', '.join(map(str, result.written))}")

"""Write the parts of README and docs that are made from the code, between their marks:

    python docs/reference.py

A part stands between ``<!-- made by docs/reference.py: NAME -->`` and ``<!-- end -->``.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from typer.main import get_command

from keyreduce.api import registries
from keyreduce.checkpoint.record import Record
from keyreduce.cli import app
from keyreduce.cli.help import rows_by_panel
from keyreduce.sweep.recipe import shipped_recipes

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
_PART = re.compile(r"(<!-- made by docs/reference\.py: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# What every command has is said once.
_SHARED = ("--json", "--quiet", "--debug", "--help")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; cells may hold bars."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def command_table() -> str:
    """Return what each command does, in the order of the help."""
    rows = [(f"`keyreduce {name}`", _first(command.help)) for name, command in _commands()]
    return table(("command", "what it does"), rows)


def command_options() -> str:
    """Return a section for each command: what its help says, and the options that its help leaves out."""
    parts = []
    for name, command in _commands():
        context = command.make_context(name, [], resilient_parsing=True)
        usage = " ".join(["keyreduce", name, *command.collect_usage_pieces(context)])
        examples = "".join(f"    {line}\n" for line in (command.epilog or "").splitlines())
        parts += [f"## {name}\n", *(f"{' '.join(text.split())}\n" for text in (command.help or "").split("\n\n"))]
        parts += [f"`{usage}`\n", "For example:\n", examples]
        parameters = command.get_params(context)
        shown = [one for one in parameters if not getattr(one, "hidden", False)]
        hidden = [one for one in parameters if getattr(one, "hidden", False)]
        for title, rows in [*rows_by_panel(shown), *rows_by_panel(hidden, "Not in the help")]:
            rows = [row for row in rows if not any(name in row[0].split(", ") for name in _SHARED)]
            if rows:
                heading = title[0].upper() + title[1:]
                parts.append(table((heading, "meaning", "default", "variable"), [_option(*row) for row in rows]))
    return "\n".join(parts)


def method_table() -> str:
    """Return the methods: what each needs, what it can cut, and its paper."""
    methods = registries.methods(registries.MethodsRequest()).methods
    rows = [
        (f"`{one['name']}`", one["summary"], one["needs"], ", ".join(one["targets"]), _linked(one["paper"]))
        for one in methods
    ]
    options = [
        (f"`{one['name']}`", f"`{option['name']}={option['default']}`", option["help"])
        for one in methods
        for option in one["options"]
    ]
    return f"{table(('method', 'chooses by', 'needs', 'can cut', 'paper'), rows)}\n" + table(
        ("method", "option and default, for `--set`", "meaning"), options
    )


def family_table() -> str:
    """Return the architectures that can be pruned."""
    rows = [
        (
            f"`{one['model_type']}`",
            ", ".join(f"`{wrapper}`" for wrapper in one["within"]),
            one["rule"],
            one["needs"],
            _linked(one["paper"]),
        )
        for one in registries.families(registries.FamiliesRequest()).families
    ]
    return table(("`model_type`", "also inside", "rule of the state", "class in", "paper of the rule"), rows)


def refused_table() -> str:
    """Return the architectures of the same kin that are refused, and why."""
    refused = registries.families(registries.FamiliesRequest()).refused
    return table(("`model_type`", "why not"), [(f"`{name}`", why) for name, why in refused.items()])


def record_table() -> str:
    """Return the fields of ``keyreduce.json``."""
    _, _, listed = (Record.__doc__ or "").partition("Attributes:\n")
    texts = {name: " ".join(text.split()) for name, text in re.findall(r"^ {8}(\w+): ((?:.|\n {12})+)", listed, re.M)}
    rows = [(f"`{field.name}`", texts[field.name].replace("``", "`")) for field in dataclasses.fields(Record)]
    return table(("field", "what it holds"), rows)


def recipe_table() -> str:
    """Return the recipes that ship, each with the sentence that its file begins with."""
    rows = []
    for name, file in shipped_recipes().items():
        comment = " ".join(line[1:].strip() for line in file.read_text().splitlines() if line.startswith("#"))
        sentence = re.split(r": +keyreduce sweep|\. |;", comment)[0]
        rows.append((f"`{name}`", sentence))
    return table(("recipe", "what it does"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "commands": command_table,
    "options": command_options,
    "methods": method_table,
    "families": family_table,
    "refused": refused_table,
    "record": record_table,
    "recipes": recipe_table,
}


def renewed(text: str) -> str:
    """Return a page with its generated parts updated; KeyError if it names a part that does not exist."""
    return _PART.sub(lambda found: f"{found[1]}\n{PARTS[found[2]]()}\n{found[3]}", text)


def _commands():
    found = get_command(app).commands.items()  # pyright: ignore[reportAttributeAccessIssue]
    order = [command.name for command in app.registered_commands]
    return sorted(found, key=lambda pair: order.index(pair[0]))


def _first(help: str | None) -> str:
    return " ".join((help or "").split("\n\n")[0].split())


def _option(label: str, meaning: str, notes: str) -> tuple[str, str, str, str]:
    paragraphs = [" ".join(one.split()) for one in meaning.split("\n\n")]
    default, _, variable = notes.rpartition("env: ") if "env: " in notes else (notes, "", "")
    default = default.removeprefix("default: ").removesuffix("; ")
    return f"`{label}`", "<br>".join(paragraphs), default, f"`{variable}`" if variable else ""


def _linked(citation: str) -> str:
    return re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", citation)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renewed(page.read_text()))

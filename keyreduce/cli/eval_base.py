"""``keyreduce eval --base``: every checkpoint below a folder, several at a time."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from keyreduce.cli.console import Console
    from keyreduce.data.text import TextSource
    from keyreduce.evaluation.many import Measured
    from keyreduce.workspace import Workspace

_PANEL = "Many models"
Base = Annotated[
    Path | None,
    typer.Option(
        envvar="COMPRESSED_BASE",
        metavar="DIR",
        rich_help_panel=_PANEL,
        help="Measure every checkpoint below this folder, and --model if given; what is done already is kept.",
    ),
]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        rich_help_panel=_PANEL,
        help="Models to measure at a time.",
        show_default="one a GPU; on a CPU 1",
    ),
]

_TITLES = {
    "perplexity_per_token": "perplexity",
    "perplexity_increase": "over dense",
    "bits_per_byte": "bits per byte",
}
_GIVEN = ("COMMANDLINE", "ENVIRONMENT")
# What is not handed on to the processes, since it is about this one, or is chosen for each.
_OWN = {"base", "compressed", "debug", "device", "jobs", "json", "model", "output", "overwrite", "work"}


def chosen_base(context: typer.Context, base: Path | None) -> Path | None:
    """Return the folder to measure; None where ``--compressed`` names one model, which overrules the variable of this.

    Raises:
        KeyreduceError: both are given by word; or this is one process of several, each of which would measure all.
    """
    from keyreduce.errors import KeyreduceError

    by_word = {name for name in ("base", "compressed") if _source(context, name) == "COMMANDLINE"}
    if len(by_word) == 2:
        raise KeyreduceError("--base measures a folder of models and --compressed one: give one of the two")
    if base is None or "compressed" in by_word:
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise KeyreduceError("--base starts processes of its own: leave out torchrun, and see --jobs")
    return base


def evaluate_base(
    console: "Console",
    context: typer.Context,
    base: Path,
    *,
    model: str | None,
    text: "TextSource",
    workspace: "Workspace",
    output: Path,
    device: str | None,
    jobs: int | None,
    again: bool,
) -> None:
    """Measure each checkpoint by a process with the options of this one, print a table, and write it to ``output``.

    Raises:
        KeyreduceError: there is no checkpoint; or, at the end, some of them could not be measured.
    """
    from keyreduce.errors import KeyreduceError
    from keyreduce.evaluation.many import Subject, find_checkpoints, measure_all
    from keyreduce.outputs import write_json

    subjects = find_checkpoints(base)
    if model is not None:
        subjects.insert(0, Subject(_unused("dense", {subject.name for subject in subjects}), model))
    devices, device_arguments = _devices(device)
    with console.progress("measuring", len(subjects), "models") as progress:
        over = measure_all(
            subjects,
            workspace.root / "eval",
            [*device_arguments, *handed_on(context)],
            settings={"text": text.identity},
            # An option is handed on in words, not by its variable.
            environment={variable: "" for variable in _variables(context)},
            workers=jobs,
            devices=devices,
            again=again,
            progress=progress,
        )
    entries = [_entry(measured) for measured in over]
    if model is not None:
        _compare(entries, subjects[0].name)
    report = {"base": str(base), "text": text.describe(), "models": entries}
    write_json(output, report, overwrite=True)
    _print(console, entries)
    console.say(f"wrote {output}")
    console.result(report)
    if failed := [measured for measured in over if measured.state == "failed"]:
        log = failed[0].result.with_suffix(".log")
        where = f"; see {log}" if log.exists() else ""
        raise KeyreduceError(
            f"{len(failed)} of {len(over)} models could not be measured, {failed[0].subject.name} among them: "
            f"{failed[0].message}{where}"
        )


def handed_on(context: typer.Context) -> list[str]:
    """Return the options of a command as they were given, by word or by variable, without those of this process."""
    arguments: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name)
        if parameter.name in _OWN or value is None or _source(context, parameter.name) not in _GIVEN:
            continue
        if isinstance(value, bool):
            arguments += [parameter.opts[0] if value else parameter.secondary_opts[0]]
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            arguments += [parameter.opts[0], str(one)]
    return arguments


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


def _variables(context: typer.Context) -> list[str]:
    variables: list[str] = []
    for parameter in context.command.params:
        given = parameter.envvar or []
        variables += [given] if isinstance(given, str) else given
    return variables


def _devices(device: str | None) -> tuple[list[str], list[str]]:
    """Return the GPUs to deal out, and what to say to the processes about their device."""
    from keyreduce.devices import pick_device
    from keyreduce.jobs import gpus

    picked = pick_device(device)
    if picked.type != "cuda":
        return [], ["--device", str(picked)]
    # A process sees one GPU alone, and calls it the first.
    return (gpus() if picked.index is None else [gpus()[picked.index]]), ["--device", "cuda"]


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "-model"
    return name


def _entry(measured: "Measured") -> dict:
    return {
        "name": measured.subject.name,
        "model": measured.subject.model,
        "state": measured.state,
        **({"message": measured.message} if measured.message else {"result": str(measured.result)}),
        "figures": dict(measured.figures),
    }


def _compare(entries: list[dict], dense: str) -> None:
    """Add the increase in perplexity over the dense model, where both were measured."""
    name = "perplexity_per_token"
    base = next(entry["figures"].get(name) for entry in entries if entry["name"] == dense)
    for entry in entries:
        if base and name in entry["figures"] and entry["name"] != dense:
            entry["figures"]["perplexity_increase"] = entry["figures"][name] / base - 1


def _print(console: "Console", entries: list[dict]) -> None:
    """One row a model, and a column for each figure, but for perplexity per word, which is in the files."""
    found = dict.fromkeys(name for entry in entries for name in entry["figures"])
    columns = [name for name in _TITLES if name in found]
    columns += [name for name in found if name not in _TITLES and name != "perplexity_per_word"]
    rows = []
    for entry in entries:
        values = (_told(name, entry["figures"].get(name)) for name in columns)
        rows.append((entry["name"], *values, entry["state"]))
    console.table(f"{len(entries)} models", ("", *(_TITLES.get(name, name) for name in columns), ""), rows)


def _told(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:+.1%}" if name == "perplexity_increase" else f"{value:,.4f}"

"""A request made into a Typer command: its fields become the options, and what they say is checked by the request."""

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from keyreduce.api.request import Request, Spec, specs
from keyreduce.cli import errors
from keyreduce.cli.console import Console
from keyreduce.cli.help import LABEL_WIDTH, Command
from keyreduce.errors import KeyreduceError

_OWN = {
    "json": typer.Option("--json", help="One JSON object on stdout, all else on stderr.", rich_help_panel="Output"),
    "quiet": typer.Option("--quiet", "-q", help="Print results and errors alone.", rich_help_panel="Output"),
    "debug": typer.Option("--debug", "--verbose", "-v", help="Show tracebacks.", rich_help_panel="Output"),
}
_VALUES = {int: "N", float: "X", str: "TEXT", Path: "PATH", bool: None}


def add_command(app: typer.Typer, show: Callable[..., object], name: str, panel: str, examples: Sequence[str]) -> None:
    """Add a command to ``app``: it calls ``show(request, console)``.

    Its help is the docstring of that request, with ``examples``; in the list of commands it stands under ``panel``.
    """
    request: type[Request] = typing.get_type_hints(show)["request"]
    fields = specs(request)

    def callback(context: typer.Context, json: bool, quiet: bool, debug: bool, **values: Any) -> None:
        placed = {name: values.pop(_placed_name(name), None) for name, field in fields.items() if _is_both(field)}
        placed = {name: value for name, value in placed.items() if value is not None}
        named = {}
        for field in fields.values():
            is_unset = values[field.name] is None and field.is_many
            is_overruled = _is_overruled(context, field, [*fields])
            if field.default is not dataclasses.MISSING and (is_unset or is_overruled):
                values[field.name] = field.default
            is_given = _source(context, field.name) == "ENVIRONMENT" and not is_overruled and field.name not in placed
            named[field.name] = _variables(field)[0] if is_given else field.flag
        errors.begin_command(named, show_tracebacks=debug)
        for name, value in placed.items():
            if _source(context, name) == "COMMANDLINE" and value != values[name]:
                told = f"{name.upper()} is {value!r} and `{name}` is {values[name]!r}"
                raise KeyreduceError(f"{told}: give one of the two")
        show(request(**values | placed), Console(as_json=json, is_quiet=quiet))

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", keyword, annotation=typer.Context)]
    for field in fields.values():
        if _is_both(field):
            annotation = _placed_annotation(field)
            parameters.append(inspect.Parameter(_placed_name(field.name), keyword, default=None, annotation=annotation))
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else _default(field)
        parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=_annotation(field)))
    for own, declared in _OWN.items():
        parameters.append(inspect.Parameter(own, keyword, default=False, annotation=Annotated[bool, declared]))
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    callback.__doc__ = request.__doc__
    app.command(name, cls=Command, epilog="\n".join(examples), rich_help_panel=panel)(callback)


def _is_overruled(context: typer.Context, field: Spec, names: list[str]) -> bool:
    """Return whether the environment gave this value, and something else says the same in another way.

    That is an option of the command line; or another variable, of those that the environment gives the last declared.
    """
    if _source(context, field.name) != "ENVIRONMENT":
        return False
    later = names[names.index(field.name) :]
    return any(
        _source(context, other) == "COMMANDLINE" or (other in later and _source(context, other) == "ENVIRONMENT")
        for other in field.option.instead_of
    )


def _is_both(field: Spec) -> bool:
    """Return whether a field may be given by its place as well as by its flag."""
    return field.option.is_argument and field.has_flag


def _placed_name(name: str) -> str:
    """Return the parameter that takes by its place what a field's flag says too."""
    return f"{name}_by_place"


def _placed_annotation(field: Spec) -> Any:
    """Return the argument beside the option of such a field; the variable and the default are the option's."""
    words = {"metavar": field.name.upper(), "help": f"The same as {field.flag}.", "show_default": False}
    return Annotated[field.kind | None, typer.Argument(**words, rich_help_panel=field.option.panel)]


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "" if source is None else source.name


def _default(field: Spec) -> Any:
    if field.option.commas and field.default:
        return ",".join(map(str, field.default))
    return None if field.is_many else field.default


def _variables(field: Spec) -> list[str]:
    """Return the environment variables that may give a field's value: the one that does, or all."""
    env = field.option.env
    names = [] if env is None else [env if env.startswith("KEYREDUCE_") else f"KEYREDUCE_{env}", env]
    names = list(dict.fromkeys(names))
    return [name for name in names if os.environ.get(name)][:1] or names


def _words(field: Spec) -> tuple[str | None, str]:
    """Return the help's word for a field's value, and what it says; choices are in the one, or else in the other."""
    settings = field.option
    if settings.metavar or not field.choices:
        value = _VALUES[field.kind] if field.has_flag else None  # an argument is called by its name
        return settings.metavar or value, settings.help
    choices = "|".join(field.choices)
    if len(f"{field.flag} {choices}") <= LABEL_WIDTH:
        return choices, settings.help
    is_said = all(choice in settings.help for choice in field.choices)
    return "NAME", settings.help if is_said else f"{settings.help} One of {', '.join(field.choices)}."


def _completer(field: Spec) -> Callable[[str], list[str]]:
    """Return what completes one of a field's choices in a shell; with commas, the last of several."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",") if field.option.commas else ("", "", incomplete)
        return [f"{before}{comma}{choice}" for choice in field.choices if choice.startswith(last)]

    return complete


def _annotation(field: Spec) -> Any:
    settings = field.option
    kind: Any = field.kind
    extra: dict[str, Any] = {}
    extra["metavar"], extra["help"] = _words(field)
    if settings.commas:
        kind = str
    elif field.is_many:
        kind = list[field.kind]
    if field.is_optional or field.is_many:
        kind = kind | None
    if names := _variables(field):
        # An error names the variable that is to blame, and the help both.
        extra["envvar"] = names[0] if os.environ.get(names[0]) else names
    if settings.shown_default is not None:
        extra["show_default"] = settings.shown_default
    extra["hidden"] = settings.hidden
    if field.choices:
        extra["autocompletion"] = _completer(field)
    extra["rich_help_panel"] = settings.panel
    if not field.has_flag:
        return Annotated[kind, typer.Argument(**extra)]
    flags = [*settings.flags] or [field.flag]
    if field.kind is bool and field.default is True:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
    return Annotated[kind, typer.Option(*flags, **extra)]

"""A request made into a Typer command: its fields become the options, and what they say is checked by the request."""

import dataclasses
import inspect
import os
import typing
from collections.abc import Callable
from typing import Annotated, Any

import typer

from keyreduce.api.request import Request, Spec, specs
from keyreduce.cli import errors
from keyreduce.cli.console import Console

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")]
_QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors alone.")]
_DEBUG = Annotated[bool, typer.Option("--debug", "--verbose", "-v", help="Show tracebacks.")]


def add_command(app: typer.Typer, show: Callable[..., object], name: str) -> None:
    """Add a command to ``app``: it calls ``show(request, console)``, and its help is the docstring of that request."""
    request: type[Request] = typing.get_type_hints(show)["request"]
    fields = specs(request)

    def callback(context: typer.Context, json: bool, quiet: bool, debug: bool, **values: Any) -> None:
        named = {}
        for field in fields.values():
            is_unset = values[field.name] is None and field.is_many
            is_overruled = _is_overruled(context, field, [*fields])
            if field.default is not dataclasses.MISSING and (is_unset or is_overruled):
                values[field.name] = field.default
            is_given = _source(context, field.name) == "ENVIRONMENT" and not is_overruled
            named[field.name] = _variables(field)[0] if is_given else field.flag
        errors.begin_command(named, show_tracebacks=debug)
        show(request(**values), Console(as_json=json, is_quiet=quiet))

    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", keyword, annotation=typer.Context)]
    for field in fields.values():
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else _default(field)
        parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=_annotation(field)))
    for own, annotation in (("json", _JSON), ("quiet", _QUIET), ("debug", _DEBUG)):
        parameters.append(inspect.Parameter(own, keyword, default=False, annotation=annotation))
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    callback.__doc__ = request.__doc__
    app.command(name)(callback)


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


def _completer(field: Spec) -> Callable[[str], list[str]]:
    """Return what completes one of a field's choices in a shell; with commas, the last of several."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",") if field.option.commas else ("", "", incomplete)
        return [f"{before}{comma}{choice}" for choice in field.choices if choice.startswith(last)]

    return complete


def _annotation(field: Spec) -> Any:
    settings = field.option
    kind: Any = field.kind
    extra: dict[str, Any] = {"metavar": settings.metavar or ("|".join(field.choices) if field.choices else None)}
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
    extra |= {"help": settings.help, "hidden": settings.hidden}
    if field.choices:
        extra["autocompletion"] = _completer(field)
    if settings.is_argument:
        return Annotated[kind, typer.Argument(**extra)]
    flags = [*settings.flags] or [field.flag]
    if field.kind is bool and field.default is True:
        flags = [f"{flags[0]}/--no-{flags[0].removeprefix('--')}"]
    return Annotated[kind, typer.Option(*flags, rich_help_panel=settings.panel, **extra)]

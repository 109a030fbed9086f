"""What all requests and results have in common: fields that are declared once, checked, and written as JSON."""

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from keyreduce.errors import KeyreduceError

_PLURAL = {int: "whole numbers", float: "numbers", str: "names", Path: "paths"}
_SINGULAR = {int: "a whole number", float: "a number", str: "a string", Path: "a path", bool: "true or false"}


@dataclass(frozen=True)
class Option:
    """What a field of a request says beside its type and default."""

    help: str  # one sentence for the command line's help.
    shown_default: str | None = None  # how the help describes the default, where that is None or found at run time.
    # the environment variable that may give the value. It answers with ``KEYREDUCE_`` before its name too.
    env: str | None = None
    metavar: str | None = None  # how the help writes the value; by default the choices, or the type's name.
    panel: str | None = None  # the heading in the help under which the field stands.
    # bounds of a number, inclusive.
    minimum: float | None = None
    maximum: float | None = None
    # names on the command line, the first of which messages use; by default ``--`` and the field's name.
    flags: tuple[str, ...] = ()
    is_argument: bool = False  # whether it may be given by its place on the command line; with ``flags`` by them too.
    commas: bool = False  # whether several values may be given as one text, with commas between them.
    # fields that say the same thing in another way. Of such a group, what stands on the command line overrules
    # what the environment says.
    instead_of: tuple[str, ...] = ()
    hidden: bool = False  # whether the help leaves it out.


def option(default: Any = dataclasses.MISSING, help: str = "", **settings: Any) -> Any:
    """Declare a field of a request; see :class:`Option` for the settings."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **settings)})


class Spec(NamedTuple):
    """A field of a request, taken apart."""

    name: str  # the field's name.
    kind: type  # the type of one value: str, int, float, bool or Path.
    choices: tuple[str, ...]  # the values there are, where that is a Literal; else empty.
    is_many: bool  # whether the field is a tuple of such values.
    is_optional: bool  # whether it may be None.
    default: Any  # its default, or ``dataclasses.MISSING``.
    option: Option  # what else is declared.

    @property
    def has_flag(self) -> bool:
        """Whether the command line has an option for it; else its place says what is meant."""
        return not self.option.is_argument or bool(self.option.flags)

    @property
    def flag(self) -> str:
        """What the command line calls it: the first flag, or the word for an argument that has none."""
        if not self.has_flag:
            return self.option.metavar or self.name.upper()
        return (*self.option.flags, f"--{self.name.replace('_', '-')}")[0]

    def checked(self, value: Any) -> Any:
        """Return a value as the field holds it: texts as paths, lists as tuples.

        Raises KeyreduceError if it is of another type, none of the choices, or out of bounds.
        """
        if value is None and self.is_optional:
            return None
        if not self.is_many:
            return self._checked_one(value)
        if isinstance(value, str) and self.option.commas:
            value = [self._parsed(part.strip()) for part in value.split(",")]
        elif value is None or isinstance(value, str | Path) or not hasattr(value, "__iter__"):
            value = [value]
        return tuple(self._checked_one(one) for one in value)

    def _parsed(self, text: str) -> Any:
        """Return one of several values that were written with commas between them."""
        try:
            return self.kind(text)
        except ValueError:
            raise KeyreduceError(
                f"`{self.name}` has {text!r}, where {_PLURAL[self.kind]} with commas between them belong"
            ) from None

    def _checked_one(self, value: Any) -> Any:
        if self.kind is Path and isinstance(value, str):
            value = Path(value)
        elif self.kind is str and isinstance(value, int | float | Path) and not isinstance(value, bool):
            value = str(value)
        elif self.kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, self.kind) or (isinstance(value, bool) and self.kind is not bool):
            wanted = _PLURAL[self.kind] if self.is_many else _SINGULAR[self.kind]
            raise KeyreduceError(f"`{self.name}` is {value!r}, where {wanted} belong{'' if self.is_many else 's'}")
        if self.choices and value not in self.choices:
            raise KeyreduceError(f"`{self.name}` is {value!r}; take one of {', '.join(self.choices)}")
        for word, bound, sign in (("at least", self.option.minimum, 1), ("at most", self.option.maximum, -1)):
            if bound is not None and not sign * value >= sign * bound:  # also where it is NaN
                raise KeyreduceError(f"`{self.name}` is {value}; it is {word} {bound:,}")
        return value


@functools.cache
def specs(request: "type[Request]") -> dict[str, Spec]:
    """Return name -> field of a request, in the order of their declaration; those of its base classes come last."""
    hints, own = typing.get_type_hints(request), inspect.get_annotations(request)
    fields = sorted(dataclasses.fields(request), key=lambda field: field.name not in own)
    return {field.name: _spec(field, hints[field.name]) for field in fields}


def _spec(field: dataclasses.Field, hint: Any) -> Spec:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    is_optional = type(None) in parts
    # Of several types the first one is what the field holds: `str | float` takes a number and keeps it as text.
    kind = next(part for part in parts if part is not type(None))
    is_many = typing.get_origin(kind) is tuple
    if is_many:
        kind = typing.get_args(kind)[0]
    choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
    kind = str if choices else kind
    return Spec(field.name, kind, choices, is_many, is_optional, field.default, field.metadata["option"])


@dataclass(frozen=True, kw_only=True)
class Request:
    """The base of all requests. Values are checked when one is made, whoever makes it.

    Raises KeyreduceError if a value is of another type than its field, none of its choices, or out of bounds.
    """

    def __post_init__(self) -> None:
        for name, spec in specs(type(self)).items():
            object.__setattr__(self, name, spec.checked(getattr(self, name)))

    @classmethod
    def of_json(cls, content: Mapping) -> Self:
        """Return the request of which :meth:`to_json` is this; fields may be missing where they have defaults.

        Raises KeyreduceError if a field is unknown or missing, or holds what it cannot hold.
        """
        known = specs(cls)
        for name in content:
            if name not in known:
                raise KeyreduceError(f"`{name}` is unknown; known are {', '.join(known)}")
        for name, spec in known.items():
            if spec.default is dataclasses.MISSING and name not in content:
                raise KeyreduceError(f"`{name}` is missing; it is {_SINGULAR[spec.kind]}")
        return cls(**content)

    def to_json(self) -> dict:
        """Return the request as a JSON object."""
        return {name: _plain(getattr(self, name)) for name in specs(type(self))}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The base of all results; its JSON object is what a command prints for shells."""

    def to_json(self) -> dict:
        """Return the result as a JSON object; a field that is None stays out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: _plain(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Report(Result):
    """Figures that were written into a file; what they are, the function says that returns it."""

    content: dict  # the JSON object that the file holds.
    output: Path  # the file.

    def to_json(self) -> dict:
        """Return the content."""
        return _plain(self.content)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value

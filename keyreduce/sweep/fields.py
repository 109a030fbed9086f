"""The fields of a recipe: which there may be, and of what kind each is."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from keyreduce.errors import KeyreduceError

_WORD = {
    list: "a list",
    dict: "a table",
    int: "a whole number",
    str: "a string",
    float: "a number",
    bool: "true or false",
}
_SEVERAL = {int: "whole numbers", str: "names"}


def check_table(
    path: Path, where: str, table: object, fields: Mapping[str, type], optional: Mapping[str, type] | None = None
) -> None:
    """Refuse a table that lacks a field, has one that nobody knows, or one of another kind.

    Args:
        path: the recipe, for the message.
        where: what stands before the names in the message, such as ``heldout.``.
        table: what the recipe says.
        fields: name -> kind of those that there must be.
        optional: of those that there may be.

    Raises:
        KeyreduceError: it is such a table.
    """
    known = {**fields, **(optional or {})}
    if not isinstance(table, dict):
        raise KeyreduceError(f"{path}: {where.rstrip('.')} is no table")
    for name in sorted(table.keys() - known.keys()):
        raise KeyreduceError(f"{path}: {where}{name} is unknown; known are {', '.join(known)}")
    for name, kind in known.items():
        if name in table:
            check_kind(path, where + name, table[name], kind)
        elif name in fields:
            raise KeyreduceError(f"{path}: {where}{name} is missing; it is {_WORD[kind]}")


def check_kind(path: Path, name: str, value: object, kind: type) -> None:
    """Refuse a value of another kind; a kind that no recipe can write is not looked at.

    Raises:
        KeyreduceError: it is of another kind.
    """
    if kind not in _WORD:
        return
    # A whole number is a number; true and false are none, though Python has them so.
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise KeyreduceError(f"{path}: {name} is {value!r}, where {_WORD[kind]} belongs")


def check_list(path: Path, name: str, values: Sequence[object], kind: type) -> None:
    """Refuse a list that holds anything but values of one kind.

    Raises:
        KeyreduceError: it does.
    """
    if any(not isinstance(value, kind) or isinstance(value, bool) for value in values):
        raise KeyreduceError(f"{path}: {name} is no list of {_SEVERAL[kind]}")


def check_filled(path: Path, where: str, table: Mapping, names: Sequence[str]) -> None:
    """Refuse lists that are empty.

    Raises:
        KeyreduceError: one is.
    """
    for name in names:
        if not table[name]:
            raise KeyreduceError(f"{path}: {where}{name} is empty, so there is nothing to measure")

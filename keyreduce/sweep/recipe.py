"""What a sweep compares, read from a TOML file.

    models = ["delta-net-5m"]           # as --model takes them

    [calibration]                       # as keyreduce calibrate takes it
    num_batches = 16
    batch_size = 4
    seq_len = 512

    [heldout]                           # as keyreduce eval takes it
    num_batches = 16
    batch_size = 4
    seq_len = 512

    [[prune]]                           # as keyreduce prune takes it; there may be several
    target = "key"
    ratios = [0.25, 0.5, 0.75]
    methods = ["rrqr", { method = "taylor", form = "squared" }]
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from keyreduce.calibration.run import Settings
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.budget import Budget
from keyreduce.pruning.methods import method_named
from keyreduce.pruning.planning import check_options

_WORD = {
    list: "a list",
    dict: "a table",
    int: "a whole number",
    str: "a string",
    float: "a number",
    bool: "true or false",
}


class Cell(NamedTuple):
    """One model pruned in one way."""

    target: str
    method: str
    options: dict[str, object]
    ratio: float

    @property
    def budget(self) -> Budget:
        """How much is to stay."""
        return Budget.parse(self.target, ratio=str(self.ratio))

    @property
    def label(self) -> str:
        """The method, with the options that are not its defaults."""
        defaults = method_named(self.method).options
        changed = [f"{name} {value}" for name, value in self.options.items() if value != defaults[name]]
        return f"{self.method} ({', '.join(changed)})" if changed else self.method


@dataclass(frozen=True)
class Recipe:
    """A sweep.

    Attributes:
        models: the models, as ``--model`` takes them.
        calibration, heldout: how much text for the sums, and for measuring.
        cells: what is done to each model.
    """

    models: list[str]
    calibration: Settings
    heldout: Settings
    cells: list[Cell]

    @property
    def needs_gradients(self) -> bool:
        """Whether a method of it does."""
        return any(method_named(cell.method).needs_gradients for cell in self.cells)


def read_recipe(path: Path) -> Recipe:
    """Read a sweep from a file.

    Raises:
        KeyreduceError: the file is missing or no TOML, or it says something that the commands do not know.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyreduceError(f"{path} is not valid TOML: {error}") from None
    _check(path, "", content, {"models": list, "calibration": dict, "heldout": dict, "prune": list})
    _check_filled(path, "", content, ("models", "prune"))
    if not all(isinstance(model, str) for model in content["models"]):
        raise KeyreduceError(f"{path}: models is no list of names")
    heldout = _settings(path, "heldout", content["heldout"])
    if heldout.seq_len < 2:
        raise KeyreduceError(f"{path}: heldout.seq_len is {heldout.seq_len}; it is at least 2, to predict one token")
    return Recipe(
        content["models"],
        _settings(path, "calibration", content["calibration"]),
        heldout,
        [cell for table in content["prune"] for cell in _cells(path, table)],
    )


def _settings(path: Path, name: str, table: Mapping) -> Settings:
    _check(path, f"{name}.", table, dict.fromkeys(("num_batches", "batch_size", "seq_len"), int))
    settings = Settings(**table)
    try:
        settings.check()
    except KeyreduceError as error:
        raise KeyreduceError(f"{path}: {name}: {error}") from None
    return settings


def _cells(path: Path, table: Mapping) -> list[Cell]:
    _check(path, "prune.", table, {"target": str, "ratios": list, "methods": list})
    _check_filled(path, "prune.", table, ("ratios", "methods"))
    for ratio in table["ratios"]:
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < 1:
            raise KeyreduceError(f"{path}: a ratio is {ratio!r}; it is the share to remove, from 0 to below 1")
    cells = []
    for given in table["methods"]:
        name, options = _method(path, given)
        for ratio in table["ratios"]:
            cell = Cell(table["target"], name, options, ratio)
            for target in cell.budget.targets:
                if target not in method_named(name).select:
                    raise KeyreduceError(f"{path}: {name} does not choose {target}s")
            cells.append(cell)
    return cells


def _method(path: Path, given: object) -> tuple[str, dict[str, object]]:
    """Return a method's name and all its options, from its name or a table with some of them."""
    options = {"method": given} if isinstance(given, str) else given
    if not isinstance(options, dict) or not isinstance(options.get("method"), str):
        raise KeyreduceError(f'{path}: a method is {given!r}, where a name or {{ method = "name", ... }} belongs')
    name, options = options["method"], {key: value for key, value in options.items() if key != "method"}
    method = method_named(name)
    for option, value in options.items():
        kind = type(method.options.get(option))
        if kind in _WORD:
            _check_kind(path, f"{option} of {name}", value, kind)
    return name, check_options(method, options)


def _check(path: Path, where: str, table: object, fields: Mapping[str, type]) -> None:
    if not isinstance(table, dict):
        raise KeyreduceError(f"{path}: {where.rstrip('.')} is no table")
    for name in sorted(table.keys() - fields.keys()):
        raise KeyreduceError(f"{path}: {where}{name} is unknown; known are {', '.join(fields)}")
    for name, kind in fields.items():
        if name not in table:
            raise KeyreduceError(f"{path}: {where}{name} is missing; it is {_WORD[kind]}")
        _check_kind(path, where + name, table[name], kind)


def _check_kind(path: Path, name: str, value: object, kind: type) -> None:
    # A whole number is a number; true and false are none, though Python has them so.
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise KeyreduceError(f"{path}: {name} is {value!r}, where {_WORD[kind]} belongs")


def _check_filled(path: Path, where: str, table: Mapping, names: Sequence[str]) -> None:
    for name in names:
        if not table[name]:
            raise KeyreduceError(f"{path}: {where}{name} is empty, so there is nothing to measure")

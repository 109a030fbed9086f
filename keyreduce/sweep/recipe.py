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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from keyreduce.calibration.run import Settings
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.budget import Budget
from keyreduce.pruning.methods import method_named
from keyreduce.pruning.planning import check_options


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
        return " ".join([self.method, *(f"({', '.join(changed)})" for _ in changed[:1])])


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
        content = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyreduceError(f"{path} is not valid TOML: {error}") from None
    _check(path, "", content, {"models": list, "calibration": dict, "heldout": dict, "prune": list})
    cells = [cell for table in content["prune"] for cell in _cells(path, table)]
    if not content["models"] or not all(isinstance(model, str) for model in content["models"]):
        raise KeyreduceError(f"{path}: models is no list of names")
    return Recipe(
        content["models"],
        _settings(path, "calibration", content["calibration"]),
        _settings(path, "heldout", content["heldout"]),
        cells,
    )


def _settings(path: Path, name: str, table: Mapping) -> Settings:
    _check(path, f"{name}.", table, dict.fromkeys(("num_batches", "batch_size", "seq_len"), int))
    settings = Settings(**table)
    settings.check()
    return settings


def _cells(path: Path, table: Mapping) -> list[Cell]:
    _check(path, "prune.", table, {"target": str, "ratios": list, "methods": list})
    cells = []
    for given in table["methods"]:
        options = {"method": given} if isinstance(given, str) else dict(given)
        name = options.pop("method", None)
        method = method_named(name)
        for ratio in table["ratios"]:
            if not isinstance(ratio, int | float) or not 0 <= ratio < 1:
                raise KeyreduceError(f"{path}: a ratio is {ratio!r}; it is the share to remove, from 0 to below 1")
            cell = Cell(table["target"], name, check_options(method, options), ratio)
            for target in cell.budget.targets:
                if target not in method.select:
                    raise KeyreduceError(f"{path}: {name} does not choose {target}s")
            cells.append(cell)
    return cells


def _check(path: Path, where: str, table: object, fields: Mapping[str, type]) -> None:
    if not isinstance(table, dict):
        raise KeyreduceError(f"{path}: {where.rstrip('.')} is no table")
    for name in table.keys() - fields.keys():
        raise KeyreduceError(f"{path}: {where}{name} is unknown; known are {', '.join(fields)}")
    for name, kind in fields.items():
        if not isinstance(table.get(name), kind) or isinstance(table[name], bool):
            raise KeyreduceError(f"{path}: {where}{name} is {table.get(name)!r}, where a {kind.__name__} belongs")

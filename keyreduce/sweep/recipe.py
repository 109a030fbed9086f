"""What a sweep compares, read from a TOML file.

models = ["delta-net-5m"]           # folders or names; may be left to the command line
seeds = [0]                         # of whatever is drawn; what comes out is averaged over them
convert = true                      # also write each pruned model as a distributed checkpoint

[calibration]                       # as keyreduce calibrate takes it
num_batches = 16
batch_size = 4
seq_len = 512
per_seed = false                    # true: each seed draws calibration text of its own; false: one serves them all

[heldout]                           # as keyreduce eval takes it
num_batches = 16
batch_size = 4
seq_len = 512

[benchmark]                         # as keyreduce benchmark takes it; without this table nothing is timed
kinds = ["mixer", "decode"]
batch_size = 4
seq_len = 1024
rounds = 10
decode_batch_sizes = [8]

[[prune]]                           # as keyreduce prune takes it; there may be several
target = "key"
ratios = [0.25, 0.5, 0.75]
methods = ["rrqr", { method = "taylor", form = "squared" }]
repairs = ["none", "least-squares"]
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
from keyreduce.recovery.modes import MODES, REPEATS
from keyreduce.recovery.repeats import check_repeats
from keyreduce.sweep.fields import check_filled, check_kind, check_list, check_table

NO_REPAIR = "none"
REPAIRS = (NO_REPAIR, *MODES)
"""What the modes of ``keyreduce recover``, and the word for leaving it out."""
KINDS = ("mixer", "forward", "decode")
_MOST_SEED = 2**32 - 1
_SIZES = dict.fromkeys(("num_batches", "batch_size", "seq_len"), int)


class Cell(NamedTuple):
    """One way of pruning a model."""

    target: str
    method: str
    options: dict[str, object]
    ratio: float
    repair: str = NO_REPAIR

    @property
    def budget(self) -> Budget:
        """How much is to stay."""
        return Budget.of(self.target.split(","), ratio=(str(self.ratio),))

    @property
    def changed_options(self) -> dict[str, object]:
        """The options that are not the method's defaults."""
        defaults = method_named(self.method).options
        return {name: value for name, value in self.options.items() if value != defaults[name]}

    @property
    def label(self) -> str:
        """The method, with the options that are not its defaults."""
        told = []
        for name, value in self.changed_options.items():
            words = name.replace("_", " ")
            told.append(words if value is True else f"no {words}" if value is False else f"{words} {value}")
        return f"{self.method} ({', '.join(told)})" if told else self.method


class Timing(NamedTuple):
    """What is timed of each pruned model, against the dense one."""

    kinds: tuple[str, ...]
    batch_size: int = 4
    seq_len: int = 1024
    rounds: int = 10
    decode_batch_sizes: tuple[int, ...] = (8,)


class Recovery(NamedTuple):
    """What a repair works with.

    Attributes:
        num_batches, batch_size, seq_len: how much text.
        steps: gradient steps a layer, where it makes any; None leaves them to it.
        repeats: the share of the rows that are random tokens, repeated, in the place of text.
    """

    num_batches: int
    batch_size: int
    seq_len: int
    steps: int | None = None
    repeats: float = REPEATS


@dataclass(frozen=True)
class Recipe:
    """A sweep.

    Attributes:
        models: the models, as ``model`` takes them.
        seeds: of what is drawn.
        calibration, heldout: how much text for the sums, and for measuring.
        per_seed: whether each seed has calibration text of its own.
        convert: whether pruned models are also written as distributed checkpoints.
        recovery: what repairs work with.
        timing: what is timed; None for nothing.
        cells: what is done to each model.
    """

    models: list[str]
    seeds: list[int]
    calibration: Settings
    heldout: Settings
    per_seed: bool
    convert: bool
    recovery: Recovery
    timing: Timing | None
    cells: list[Cell]

    @property
    def needs_gradients(self) -> bool:
        """Whether a method of it does."""
        return any(method_named(cell.method).needs_gradients for cell in self.cells)

    def calibration_seed(self, seed: int) -> int:
        """Return the seed of the calibration text that a run of a seed uses."""
        return seed if self.per_seed else self.seeds[0]


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
    check_table(
        path,
        "",
        content,
        {"calibration": dict, "heldout": dict, "prune": list},
        {"models": list, "seeds": list, "convert": bool, "recover": dict, "benchmark": dict},
    )
    check_filled(path, "", content, ("prune",))
    seeds = content.get("seeds", [0])
    check_list(path, "seeds", seeds, int)
    check_seeds(seeds, f"{path}: seeds")
    models = content.get("models", [])
    check_list(path, "models", models, str)
    heldout = _settings(path, "heldout", content["heldout"])
    if heldout.seq_len < 2:
        raise KeyreduceError(f"{path}: heldout.seq_len is {heldout.seq_len}; it is at least 2, to predict one token")
    calibration, per_seed = content["calibration"], False
    if "per_seed" in calibration:
        calibration = dict(calibration)
        per_seed = calibration.pop("per_seed")
        check_kind(path, "calibration.per_seed", per_seed, bool)
    settings = _settings(path, "calibration", calibration)
    return Recipe(
        models,
        seeds,
        settings,
        heldout,
        per_seed,
        content.get("convert", True),
        _recovery(path, content["recover"]) if "recover" in content else Recovery(*settings[:3]),
        _timing(path, content["benchmark"]) if "benchmark" in content else None,
        [cell for table in content["prune"] for cell in _cells(path, table)],
    )


def check_seeds(seeds: list[int], where: str) -> None:
    """Refuse seeds that are none, or of which two are alike.

    Raises:
        KeyreduceError: they are such.
    """
    if not seeds:
        raise KeyreduceError(f"{where} is empty, so there is nothing to measure")
    if len(set(seeds)) < len(seeds) or not all(0 <= seed <= _MOST_SEED for seed in seeds):
        told = ", ".join(map(str, seeds))
        raise KeyreduceError(f"{where} is {told}; seeds differ from each other and are 0 to {_MOST_SEED}")


def _settings(path: Path, name: str, table: Mapping) -> Settings:
    check_table(path, f"{name}.", table, _SIZES)
    settings = Settings(**table)
    try:
        settings.check()
    except KeyreduceError as error:
        raise KeyreduceError(f"{path}: {name}: {error}") from None
    return settings


def _recovery(path: Path, table: Mapping) -> Recovery:
    check_table(path, "recover.", table, _SIZES, {"steps": int, "repeats": float})
    if table.get("steps", 1) < 1:
        raise KeyreduceError(f"{path}: recover.steps is {table['steps']}; it is at least 1")
    _settings(path, "recover", {name: table[name] for name in _SIZES})
    recovery = Recovery(**table)
    try:
        check_repeats(recovery.repeats)
    except KeyreduceError as error:
        raise KeyreduceError(f"{path}: recover: {error}") from None
    return recovery


def _timing(path: Path, table: Mapping) -> Timing:
    sizes = dict.fromkeys(("batch_size", "seq_len", "rounds"), int)
    check_table(path, "benchmark.", table, {"kinds": list}, {**sizes, "decode_batch_sizes": list})
    check_filled(path, "benchmark.", table, ("kinds",))
    for kind in table["kinds"]:
        if kind not in KINDS:
            raise KeyreduceError(f"{path}: benchmark.kinds has {kind!r}; known are {', '.join(KINDS)}")
    check_list(path, "benchmark.decode_batch_sizes", table.get("decode_batch_sizes", [1]), int)
    check_filled(path, "benchmark.", {"decode_batch_sizes": [1]} | table, ("decode_batch_sizes",))
    timing = Timing(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})
    if min(timing.batch_size, timing.seq_len, timing.rounds, *timing.decode_batch_sizes) < 1:
        raise KeyreduceError(f"{path}: a number of benchmark is below 1")
    return timing


def _cells(path: Path, table: Mapping) -> list[Cell]:
    check_table(path, "prune.", table, {"target": str, "ratios": list, "methods": list}, {"repairs": list})
    check_filled(path, "prune.", {"repairs": [NO_REPAIR]} | table, ("ratios", "methods", "repairs"))
    for ratio in table["ratios"]:
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < 1:
            raise KeyreduceError(f"{path}: a ratio is {ratio!r}; it is the share to remove, from 0 to below 1")
    repairs = table.get("repairs", [NO_REPAIR])
    for repair in repairs:
        if repair not in REPAIRS:
            raise KeyreduceError(f"{path}: a repair is {repair!r}; known are {', '.join(REPAIRS)}")
    cells = []
    for given in table["methods"]:
        name, options = _method(path, given)
        for ratio in table["ratios"]:
            cell = Cell(table["target"], name, options, ratio)
            for target in cell.budget.targets:
                if target not in method_named(name).select:
                    raise KeyreduceError(f"{path}: {name} does not choose {target}s")
            cells += [cell._replace(repair=repair) for repair in repairs]
    return cells


def _method(path: Path, given: object) -> tuple[str, dict[str, object]]:
    """Return a method's name and all its options, from its name or a table with some of them."""
    options = {"method": given} if isinstance(given, str) else given
    if not isinstance(options, dict) or not isinstance(options.get("method"), str):
        raise KeyreduceError(f'{path}: a method is {given!r}, where a name or {{ method = "name", ... }} belongs')
    name, options = options["method"], {key: value for key, value in options.items() if key != "method"}
    method = method_named(name)
    for option, value in options.items():
        if option in method.options:
            check_kind(path, f"{option} of {name}", value, type(method.options[option]))
    return name, check_options(method, options)

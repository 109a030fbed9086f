"""What a sweep compares, read from a TOML file. Its tables hold fields of the requests of the single commands.

models = ["delta-net-5m"]           # folders or names; the command line may name others
seeds = [0]                         # of everything that is drawn; results are averaged over them
convert = true                      # also write each pruned model as a distributed checkpoint

[calibration]                       # keyreduce calibrate
num_batches = 16
per_seed = false                    # true: each seed draws calibration text of its own; false: one draw serves all

[recover]                           # keyreduce recover; without num_batches, batch_size, seq_len: as in [calibration]
[heldout]                           # keyreduce eval
[benchmark]                         # keyreduce benchmark; without this table nothing is timed
kinds = ["mixer", "decode"]

[[prune]]                           # keyreduce prune, for each ratio with each method and each repair; may be repeated
target = "key"
ratios = [0.25, 0.5, 0.75]
methods = ["rrqr", { method = "taylor", form = "squared" }]
repairs = ["none", "least-squares"]
"""

import contextlib
import difflib
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Self

from keyreduce.api.benchmark import BenchmarkRequest
from keyreduce.api.calibrate import CalibrateRequest
from keyreduce.api.evaluate import EvaluateRequest
from keyreduce.api.options import MOST_SEED
from keyreduce.api.prune import Cut, PruneRequest
from keyreduce.api.recover import RecoverRequest
from keyreduce.api.request import Request, option, specs
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.methods import method_named
from keyreduce.recovery.repeats import check_repeats

NO_REPAIR = "none"
"""What a recipe calls a pruned model that is left as it is cut."""

_KINDS = ("mixer", "forward", "decode")
_LISTS = ("ratios", "methods", "repairs")
_TABLES = ("calibration", "heldout", "recover", "benchmark")
# Fields of requests that a recipe does not say: the sweep fills them in, or they have no place in one.
_NOT_IN_RECIPES = {
    *("model", "compressed", "base", "work", "pruned", "output", "plot", "overwrite", "unrelated", "config", "teacher"),
    *("text", "dataset", "dataset_config", "split", "heldout", "calibration", "seed", "device", "dtype", "jobs"),
    *("method", "set", "ratio", "keep", "variance", "recover", "verify", "max_shard_size"),
    *("push_to_hub", "mode", "gradients", "mixer", "forward", "decode", "train_step", "scaling"),
    *("state_ratio", "state_bytes", "fit", "state_dtypes", "search", "dry_run"),
}
# Fields of requests that have another name in a recipe.
_NAMES = {"method": "methods", "set": "methods", "ratio": "ratios", "recover": "repairs"}
_NAMES["per_seed"] = "calibration.per_seed"


class Combination(NamedTuple):
    """One way of pruning a model: what is removed, how it is chosen, and how quality is recovered afterwards."""

    request: PruneRequest

    @property
    def target(self) -> str:
        """What is removed; several targets have commas between them."""
        return ",".join(self.request.target or ("key",))

    @property
    def ratio(self) -> float:
        """The share that is removed."""
        return float(Fraction(self.request.ratio[0]))

    @property
    def repair(self) -> str:
        """The mode of ``keyreduce recover``, or `NO_REPAIR`."""
        return self.request.recover or NO_REPAIR

    def resolved(self, device_type: str) -> Self:
        """Return it with the mode of recovery that ``auto`` is on a type of device."""
        return self._replace(request=self.request.resolved(device_type))

    @property
    def label(self) -> str:
        """The method, with all settings that differ from the defaults."""
        cut, fields = Cut.of(self.request), specs(PruneRequest)
        others = [name for name in _known(PruneRequest) if name != "target" and name not in cut.options]
        values = {**cut.options, **{name: getattr(self.request, name) for name in others}}
        defaults = {**cut.method.options, **{name: fields[name].default for name in others}}
        changed = [_words(name, value) for name, value in values.items() if value != defaults[name]]
        return f"{cut.method.name} ({', '.join(changed)})" if changed else cut.method.name


@dataclass(frozen=True, kw_only=True)
class _Head(Request):
    """What a recipe says outside of the commands' tables."""

    models: tuple[str, ...] = option((), help="The models to prune.")
    seeds: tuple[int, ...] = option((0,), help="Seeds of everything that is drawn.", minimum=0, maximum=MOST_SEED)
    convert: bool = option(True, help="Whether pruned models are also written as distributed checkpoints.")
    per_seed: bool = option(False, help="Whether each seed draws calibration text of its own.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A sweep: what the head of the recipe, its tables and its combinations say, and the file, which messages name.

    Where ``benchmark`` is None, nothing is timed.
    """

    path: Path
    models: tuple[str, ...]
    seeds: tuple[int, ...]
    convert: bool
    per_seed: bool
    calibration: CalibrateRequest
    heldout: EvaluateRequest
    recover: RecoverRequest
    benchmark: BenchmarkRequest | None
    combinations: list[Combination]

    @property
    def needs_gradients(self) -> bool:
        """Whether one of the methods needs gradients."""
        return any(method_named(combination.request.method).needs_gradients for combination in self.combinations)

    def calibration_seed(self, seed: int) -> int:
        """Return the seed of the calibration text for the runs with ``seed``."""
        return seed if self.per_seed else self.seeds[0]


def read_recipe(path: Path) -> Recipe:
    """Read a recipe: a file, or where there is none a recipe of the package by its name, such as ``quick``.

    Raises:
        KeyreduceError: there is no such file or recipe, the file cannot be read or is no TOML, or it holds what the
            commands do not take.
    """
    shipped = shipped_recipes()
    file = shipped.get(str(path), path) if not path.is_file() else path
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.stem.lower(), shipped, n=1)
        guess = f"did you mean {near[0]}? Those" if near else "those"
        told = f"there is no recipe {str(path)!r}, neither a file nor one that ships"
        raise KeyreduceError(f"{told}; {guess} that ship are {', '.join(shipped)}") from None
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyreduceError(f"{path} is not valid TOML: {error}") from None
    with named(path):
        _checked("", content, ("models", "seeds", "convert", *_TABLES, "prune"))
        tables = {name: content.pop(name, {}) for name in _TABLES}
        calibration = _checked("calibration", tables["calibration"], [*_known(CalibrateRequest), "per_seed"])
        lists = content.pop("prune", None)
        if lists is None:
            raise KeyreduceError("there is no [[prune]] table, of which a recipe has at least one")
        if not isinstance(lists, list) or not lists:
            raise KeyreduceError(f"prune is {lists!r}, where at least one [[prune]] table belongs")
        head = _Head.of_json(content | {"per_seed": calibration.pop("per_seed", False)})
        check_seeds("seeds", head.seeds)
    with named(path, "calibration"):
        calibrate = CalibrateRequest.of_json(calibration)
    with named(path, "heldout"):
        evaluate = EvaluateRequest.of_json(_checked("heldout", tables["heldout"], _known(EvaluateRequest)))
    with named(path, "recover"):
        settings = _checked("recover", tables["recover"], _known(RecoverRequest))
        recover = RecoverRequest.of_json(sizes_of(calibrate) | settings)
        check_repeats(recover.repeats or 0.0)
    return Recipe(
        path=path,
        **vars(head),
        calibration=calibrate,
        heldout=evaluate,
        recover=recover,
        benchmark=_benchmark(path, tables["benchmark"]) if tables["benchmark"] else None,
        combinations=[combination for table in lists for combination in _combinations(path, table)],
    )


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes of the package, name -> file."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


@contextlib.contextmanager
def named(path: Path, table: str = "") -> Iterator[None]:
    """Let errors that the block raises name the recipe, and each field by the table and key that hold it."""
    prefix = f"{table}." if table else ""
    try:
        yield
    except KeyreduceError as error:
        raise KeyreduceError(f"{path}: {error.with_names(lambda name: prefix + _NAMES.get(name, name))}") from None


def sizes_of(request: CalibrateRequest | EvaluateRequest) -> dict[str, int]:
    """Return the fields that say how much text is read."""
    return {name: getattr(request, name) for name in ("num_batches", "batch_size", "seq_len")}


def check_seeds(name: str, seeds: tuple[int, ...]) -> None:
    """Raise KeyreduceError for no seeds at all, or one that comes twice; ``name`` is the field that holds them."""
    if not seeds or len(set(seeds)) < len(seeds):
        told = ", ".join(map(str, seeds)) or "empty"
        raise KeyreduceError(f"`{name}` is {told}; give at least one seed, and each of them once")


def _checked(name: str, table: Any, known: Iterable[str]) -> dict[str, Any]:
    """Return what a recipe holds under ``name``, if it is a table and has no other keys than ``known``."""
    if not isinstance(table, dict):
        raise KeyreduceError(f"{name} is {table!r}, where a table belongs")
    for key in table:
        if key not in known:
            raise KeyreduceError(f"{name}{'.' if name else ''}{key} is unknown; known are {', '.join(known)}")
    return table


def _known(kind: type[Request]) -> list[str]:
    """Return the fields of a request that a recipe may hold."""
    return [name for name in specs(kind) if name not in _NOT_IN_RECIPES]


def _benchmark(path: Path, table: Any) -> BenchmarkRequest:
    with named(path, "benchmark"):
        settings = dict(_checked("benchmark", table, ["kinds", *_known(BenchmarkRequest)]))
        kinds = settings.pop("kinds", None)
        if not isinstance(kinds, list) or not kinds or any(kind not in _KINDS for kind in kinds):
            raise KeyreduceError(f"`kinds` is {kinds!r}; give a list of some of {', '.join(_KINDS)}")
        # The tables do not show the largest batch, and the search for it takes long.
        defaults = {"decode_batch_sizes": [8], "max_batch_size": 0}
        return BenchmarkRequest.of_json({**defaults, **settings, **dict.fromkeys(kinds, True)})


def _combinations(path: Path, table: Any) -> list[Combination]:
    with named(path, "prune"):
        shared = {"repairs": [NO_REPAIR], **_checked("prune", table, [*_LISTS, *_known(PruneRequest)])}
        ratios, methods, repairs = lists = [shared.pop(name, None) for name in _LISTS]
        for name, values in zip(_LISTS, lists, strict=True):
            if not isinstance(values, list) or not values:
                raise KeyreduceError(f"`{name}` is {values!r}, where a list with at least one value belongs")
        requests = [
            PruneRequest.of_json(fields | {"ratio": ratio, "recover": None if repair == NO_REPAIR else repair})
            for fields in (shared | _method(method) for method in methods)
            for ratio in ratios
            for repair in repairs
        ]
        for request in requests:
            Cut.of(request)  # which refuses options that the method does not take
    return [Combination(request) for request in requests]


def _method(given: object) -> dict[str, Any]:
    """Return the fields of a request that a method's name, or a table with its name and options, stands for."""
    table = {"method": given} if isinstance(given, str) else given
    if not isinstance(table, dict) or not isinstance(table.get("method"), str):
        raise KeyreduceError(f'`method` is {given!r}, where a name or {{ method = "name", ... }} belongs')
    # What is no field of the request is an option of a method from another package.
    own = {name: value for name, value in table.items() if name in ("method", *_known(PruneRequest))}
    return own | {"set": [f"{name}={value}" for name, value in table.items() if name not in own]}


def _words(name: str, value: object) -> str:
    """Return a setting as a label shows it."""
    name = name.replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"

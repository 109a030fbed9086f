"""What a sweep compares, read from a TOML file. Its tables hold fields of the requests of the single commands.

models = ["delta-net-5m"]           # folders or names; the command line may name others
seeds = [0]                         # of everything that is drawn; results are averaged over them
convert = true                      # also write each pruned model as a distributed checkpoint

[calibration]                       # keyreduce calibrate
num_batches = 16
batch_size = 4
seq_len = 512
per_seed = false                    # true: each seed draws calibration text of its own; false: one draw serves all

[recover]                           # keyreduce recover; without num_batches, batch_size, seq_len: as in [calibration]
steps = 512

[heldout]                           # keyreduce eval
num_batches = 16
batch_size = 4
seq_len = 512

[benchmark]                         # keyreduce benchmark; without this table nothing is timed
kinds = ["mixer", "decode"]
batch_size = 4
seq_len = 1024
rounds = 10
decode_batch_sizes = [8]

[[prune]]                           # keyreduce prune, for each ratio with each method and each repair; may be repeated
target = "key"
ratios = [0.25, 0.5, 0.75]
methods = ["rrqr", { method = "taylor", form = "squared" }]
repairs = ["none", "least-squares"]
"""

import contextlib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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

R = TypeVar("R", bound=Request)
NO_REPAIR = "none"
"""What a recipe calls a pruned model that is left as it is cut."""

_KINDS = ("mixer", "forward", "decode")
_SIZES = ("num_batches", "batch_size", "seq_len")
_LISTS = ("ratios", "methods", "repairs")
_TABLES = ("calibration", "heldout", "recover", "benchmark")
# Fields of requests that a recipe does not say: the sweep fills them in, or they have no place in one.
_NOT_IN_RECIPES = {
    *("model", "compressed", "base", "work", "pruned", "output", "plot", "overwrite", "unrelated", "config", "teacher"),
    *("text", "dataset", "dataset_config", "split", "heldout", "calibration", "seed", "device", "dtype", "jobs"),
    *("method", "set", "ratio", "keep", "variance", "recover", "verify", "max_shard_size"),
    *("push_to_hub", "mode", "gradients", "mixer", "forward", "decode", "train_step", "scaling"),
}
# Fields of requests that have another name in a recipe.
_NAMES = {"method": "methods", "per_seed": "calibration.per_seed", "ratio": "ratios", "recover": "repairs"}
_NAMES["set"] = _NAMES["method"]


class Combination(NamedTuple):
    """One way of pruning a model.

    Attributes:
        request: what is removed, how it is chosen, and how quality is won back afterwards.
    """

    request: PruneRequest

    @property
    def target(self) -> str:
        """What is removed; several targets have commas between them."""
        return ",".join(self.request.target)

    @property
    def ratio(self) -> float:
        """The share that is removed."""
        return float(Fraction(self.request.ratio[0]))

    @property
    def repair(self) -> str:
        """The mode of ``keyreduce recover``, or `NO_REPAIR`."""
        return self.request.recover or NO_REPAIR

    @property
    def label(self) -> str:
        """The method, with all settings that differ from the defaults."""
        cut = Cut.of(self.request)
        changed = {name: value for name, value in cut.options.items() if value != cut.method.options[name]}
        for name, field in specs(PruneRequest).items():
            value = getattr(self.request, name)
            if name not in _NOT_IN_RECIPES | {"target", *changed} and name not in cut.options and value != field.default:
                changed[name] = value
        return f"{cut.method.name} ({', '.join(map(_words, changed, changed.values()))})" if changed else cut.method.name


@dataclass(frozen=True, kw_only=True)
class _Head(Request):
    """What a recipe says outside of the commands' tables."""

    models: tuple[str, ...] = option((), help="The models to prune.")
    seeds: tuple[int, ...] = option((0,), help="Seeds of everything that is drawn.", minimum=0, maximum=MOST_SEED)
    convert: bool = option(True, help="Whether pruned models are also written as distributed checkpoints.")
    per_seed: bool = option(False, help="Whether each seed draws calibration text of its own.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A sweep.

    Attributes:
        path: the file, which messages name.
        models, seeds: what is pruned, and the seeds of everything that is drawn.
        convert: whether pruned models are also written as distributed checkpoints.
        per_seed: whether each seed draws calibration text of its own.
        calibration, heldout, recover, benchmark: the settings of each command; where ``benchmark`` is None, nothing is
            timed.
        combinations: what is done to each model.
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
    """Read a sweep from a file.

    Raises:
        KeyreduceError: the file is missing or no TOML, or it holds what the commands do not take.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyreduceError(f"{path} is not valid TOML: {error}") from None
    with named(path):
        _check_keys("", content, ("models", "seeds", "convert", *_TABLES, "prune"))
        tables = {name: content.pop(name, {}) for name in _TABLES}
        for name, table in tables.items():
            _check_table(name, table)
        lists = content.pop("prune", None)
        if not isinstance(lists, list) or not lists:
            raise KeyreduceError(f"prune is {lists!r}, where at least one [[prune]] table belongs")
        calibration = tables["calibration"]
        head = _Head.of_json(content | {"per_seed": calibration.pop("per_seed", False)})
        check_seeds("seeds", head.seeds)
    sizes = {name: calibration[name] for name in _SIZES if name in calibration}
    recover = _request(path, "recover", RecoverRequest, sizes | tables["recover"])
    with named(path, "recover"):
        check_repeats(recover.repeats or 0.0)
    return Recipe(
        path=path,
        **vars(head),
        calibration=_request(path, "calibration", CalibrateRequest, calibration),
        heldout=_request(path, "heldout", EvaluateRequest, tables["heldout"]),
        recover=recover,
        benchmark=_benchmark(path, tables["benchmark"]) if tables["benchmark"] else None,
        combinations=[combination for table in lists for combination in _combinations(path, table)],
    )


@contextlib.contextmanager
def named(path: Path, table: str = "") -> Iterator[None]:
    """Let errors that the block raises name the recipe, and each field by the table and key that hold it."""
    prefix = f"{table}." if table else ""
    try:
        yield
    except KeyreduceError as error:
        raise KeyreduceError(f"{path}: {error.with_names(lambda name: prefix + _NAMES.get(name, name))}") from None


def check_seeds(name: str, seeds: tuple[int, ...]) -> None:
    """Refuse no seeds at all, or one that comes twice; ``name`` is the field that holds them.

    Raises:
        KeyreduceError: they are such.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        told = ", ".join(map(str, seeds)) or "empty"
        raise KeyreduceError(f"`{name}` is {told}; give at least one seed, and each of them once")


def _check_table(name: str, table: object) -> None:
    if not isinstance(table, dict):
        raise KeyreduceError(f"{name} is {table!r}, where a table belongs")


def _check_keys(table: str, content: Mapping, known: Iterable[str]) -> None:
    for name in content:
        if name not in known:
            raise KeyreduceError(f"{table}{name} is unknown; known are {', '.join(known)}")


def _known(kind: type[Request]) -> list[str]:
    """Return the fields of a request that a recipe may hold."""
    return [name for name in specs(kind) if name not in _NOT_IN_RECIPES]


def _request(path: Path, name: str, kind: type[R], table: Mapping) -> R:
    with named(path, name):
        _check_keys(f"{name}.", table, _known(kind))
        return kind.of_json(table)


def _benchmark(path: Path, table: Mapping) -> BenchmarkRequest:
    with named(path, "benchmark"):
        _check_keys("benchmark.", table, ["kinds", *_known(BenchmarkRequest)])
        kinds = table.get("kinds")
        if not isinstance(kinds, list) or not kinds or any(kind not in _KINDS for kind in kinds):
            raise KeyreduceError(f"`kinds` is {kinds!r}; give a list of some of {', '.join(_KINDS)}")
        settings = {name: value for name, value in table.items() if name != "kinds"}
        # Nothing in a table shows the largest batch, and the search for it takes long.
        settings = {"decode_batch_sizes": [8], "max_batch_size": 0, **settings, **dict.fromkeys(kinds, True)}
        return BenchmarkRequest.of_json(settings)


def _combinations(path: Path, table: object) -> list[Combination]:
    with named(path, "prune"):
        _check_table("a [[prune]]", table)
        _check_keys("prune.", table, [*_LISTS, *_known(PruneRequest)])
        ratios, methods, repairs = ({"repairs": [NO_REPAIR], **table}.get(name) for name in _LISTS)
        for name, values in zip(_LISTS, (ratios, methods, repairs), strict=True):
            if not isinstance(values, list) or not values:
                raise KeyreduceError(f"`{name}` is {values!r}, where a list with at least one value belongs")
        shared = {name: value for name, value in table.items() if name not in _LISTS}
        chosen = [shared | _method(method) for method in methods]
        requests = [
            PruneRequest.of_json(fields | {"ratio": ratio, "recover": None if repair == NO_REPAIR else repair})
            for fields in chosen
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
    """Return a setting as a label tells it."""
    name = name.replace("_", " ")
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"

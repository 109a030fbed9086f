"""Statistics and a checkpoint to a smaller checkpoint."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyreduce.api import options
from keyreduce.api.request import Result, option
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.budget import DEFAULT_RATIO
from keyreduce.pruning.methods import METHODS, method_named, registered_elsewhere
from keyreduce.recovery.modes import MODES
from keyreduce.reporting import Reporter
from keyreduce.serving.engines import EngineName

if TYPE_CHECKING:
    from keyreduce.calibration.statistics import Statistics
    from keyreduce.checkpoint.source import Checkpoint
    from keyreduce.pruning.budget import Budget
    from keyreduce.pruning.methods import Method
    from keyreduce.pruning.plan import Plan

_METHOD_HELP = "\n\n".join(
    [
        *(f"{method.name}: {method.summary}" for method in METHODS.values()),
        *(f"{name}: from {point.value.split(':')[0]}" for name, point in registered_elsewhere().items()),
    ]
)
_OF_METHODS = "Options of single methods"


@dataclass(frozen=True, kw_only=True)
class PruneRequest(options.OfRun, options.OfText):
    """Remove channels or heads, and write a checkpoint that fla and transformers load unchanged.

    A method that needs calibration statistics runs keyreduce calibrate first, where they are missing; --device and the
    text are for that and for --recover, --device also for --verify.
    """

    model: str | None = options.model()
    work: Path = options.work()
    method: str = option("auto", help=_METHOD_HELP, env="PRUNING_STRATEGY", metavar="NAME")
    target: tuple[Literal["key", "value", "head"], ...] = option(
        ("key",),
        help="What to remove: key channels, value channels, whole key heads, or several, with commas.",
        metavar="key,value,head",
        commas=True,
    )
    ratio: tuple[str, ...] = option(
        (),
        help="Share to remove: of each head's channels, of a layer's heads. One for each target, with commas.",
        env="PRUNING_RATIO",
        metavar="SHARE",
        shown_default=DEFAULT_RATIO,
        commas=True,
        instead_of=("keep", "variance"),
    )
    keep: tuple[str, ...] = option(
        (),
        help="How many to keep, instead of --ratio.",
        metavar="NUMBER",
        flags=("--keep", "--rank"),
        commas=True,
        instead_of=("ratio", "variance"),
    )
    multiple_of: int = option(1, help="Round kept channels to the nearest multiple.")
    allocate: Literal["uniform", "energy"] = option(
        "uniform",
        help="Key channels of the layers: all alike, or where q and k have their energy, in all as many "
        "(delta_net_2 alone can say it).",
    )
    calibration: Path | None = options.output(help="The calibration file.", metavar="FILE")
    output: Path | None = options.output(help="The pruned checkpoint.", env="OUTPUT_DIR")
    f: float | None = option(
        None,
        help="rrqr: swap while one makes the kept block's volume more than f times as large.",
        panel=_OF_METHODS,
        shown_default=str(METHODS["rrqr"].options["f"]),
    )
    permute: bool = option(False, help="rrqr: shuffle ties, by --seed.", panel=_OF_METHODS)
    form: Literal["first", "squared", "element"] | None = option(
        None,
        help="taylor: gradients summed with their sign, squared (Fisher), or weight by weight.",
        panel=_OF_METHODS,
        shown_default=str(METHODS["taylor"].options["form"]),
    )
    include_queries: bool = option(False, help="pca: of q and k, not of k alone.", panel=_OF_METHODS)
    set: tuple[str, ...] = option(
        (),
        help="Any option of a method, also of one from another package; may be repeated.",
        metavar="NAME=VALUE",
        panel=_OF_METHODS,
    )
    variance: float | None = option(
        None,
        help="pca: the rank that keeps this share, instead of --ratio.",
        panel=_OF_METHODS,
        instead_of=("ratio", "keep"),
    )
    verify: Literal["logits", "load"] | None = option(
        None,
        help="Before it appears: load, build the library's own model for it; logits, run it against the dense model "
        "with the dropped channels masked.",
        shown_default="tensors and shapes alone",
    )
    engine: EngineName | None = option(
        None, help="Refuse sizes that this serving engine does not run.", shown_default="the result says which do"
    )
    recover: Literal["least-squares", "reconstruct"] | None = option(
        None,
        help=f"Win quality back before it appears, as keyreduce recover --mode does: {' or '.join(MODES)}.",
        shown_default="left as it is cut",
    )
    config: Path | None = options.config()
    dtype: options.Dtype | None = options.cast_to()
    max_shard_size: str | None = options.max_shard_size()
    push_to_hub: str | None = options.push_to_hub()


@dataclass(frozen=True, kw_only=True)
class PruneResult(Result):
    """A pruned checkpoint. Where layers differ, a size is a list with one entry for each.

    Attributes:
        pruned: its folder.
        made: whether this run made it; else it was there already, from the same inputs.
        dense: the model that it was made from, by the name it was given.
        method, target: how it was chosen what to remove, and of what; targets with commas.
        key_heads, value_heads, head_k_dim, head_v_dim: sizes before and after the cut.
        state_bytes_per_sequence: recurrent state of one sequence in all layers, in float32, before and after.
        mixer_parameters, model_parameters: numbers of parameters, before and after.
        smaller: the same as a sentence.
        suited_engines, unsuited_engines: which serving engines run these sizes, and which do not, with their demand.
        pushed: the address on the hub that it was uploaded to, if that was asked for.
        repair: mode, tokens, seconds and layers of the recovery that followed the cut, if one did.
    """

    pruned: Path
    made: bool
    dense: str
    method: str
    target: str
    key_heads: list
    value_heads: list
    head_k_dim: list
    head_v_dim: list
    state_bytes_per_sequence: list[int]
    mixer_parameters: list[int]
    model_parameters: list[int]
    smaller: str
    suited_engines: list[str]
    unsuited_engines: list[str]
    pushed: str | None = None
    repair: dict | None = None


def run(request: PruneRequest, reporter: Reporter = Reporter(), statistics: "Statistics | None" = None) -> PruneResult:
    """Prune a checkpoint, or leave the one that was made from the same inputs.

    Args:
        request: what to do.
        reporter: what is given remarks and progress.
        statistics: in the place of those of the calibration file.

    Raises:
        KeyreduceError: there is no such model or method, they do not go together, the amounts are impossible, the
            statistics are of another model, or the output is there from other inputs, or cannot be written.
    """
    from keyreduce.checkpoint.find import open_model
    from keyreduce.checkpoint.hub import push_to_hub
    from keyreduce.checkpoint.writing import parse_size
    from keyreduce.devices import pick_device
    from keyreduce.outputs import claimed, is_already_made, refuse_source
    from keyreduce.workspace import Workspace

    cut = Cut.of(request)
    run_on = pick_device(request.device)  # a wrong one is refused even where nothing is left to calibrate
    shard_bytes = request.max_shard_size and parse_size(request.max_shard_size)
    source = open_model(request.model, config=request.config)
    if request.dtype is None and source.shards is None:
        source.refuse_other_dtype()
    cut.check(source)
    text = request.text_source("calibration")
    target = request.output or Workspace(request.work).pruned
    refuse_source(target, Path(request.model) if request.model and os.path.isdir(request.model) else source.path)
    inputs = {
        "source": source.identity,
        **cut.describe(source),
        **({"dtype": request.dtype} if request.dtype else {}),
        **({"max_shard_size": shard_bytes} if shard_bytes else {}),
    }
    wanted = {"repairs": [[request.recover, text.identity]]} if request.recover else {}
    with claimed(target, folder=True) as claim:
        recorded = None if request.overwrite else _recorded_inputs(target)
        # What differs already is refused before calibration, which takes time and leaves a file.
        comparable = recorded and {name: value for name, value in recorded.items() if name != "calibration"}
        is_already_made(target, comparable, inputs | wanted, request.overwrite)
        if cut.needs_statistics:
            statistics = statistics or _statistics(request, source, cut.method.needs_gradients, reporter)
            # Gradients leave the other statistics as they are.
            without = () if cut.method.needs_gradients else ("gradients",)
            inputs["calibration"] = {name: value for name, value in statistics.inputs.items() if name not in without}
        made = not is_already_made(target, recorded, inputs | wanted, request.overwrite)
        if made:
            plan = cut.plan(source, statistics, inputs, reporter)
            folder = claim.scratch / "cut" if request.recover else target
            _write(request, source, plan, folder, shard_bytes, run_on, reporter)
            if request.recover:
                _recover(request, folder, target, reporter)
    pushed = request.push_to_hub and push_to_hub(target, request.push_to_hub)
    return replace(_result(source, target, made=made), pushed=pushed)


@dataclass(frozen=True)
class Cut:
    """What a request asks to remove, checked as far as it can be without a model.

    Attributes:
        method: what chooses.
        options: all of its options.
        budget: how much stays.
        engine: the serving engine that must run the sizes, if any.
        seed: of what is drawn.
    """

    method: "Method"
    options: Mapping[str, object]
    budget: "Budget"
    engine: EngineName | None
    seed: int

    @classmethod
    def of(cls, request: PruneRequest) -> "Cut":
        """Return the cut that a request asks for.

        Raises:
            KeyreduceError: there is no such method or option, or the amounts are impossible.
        """
        from keyreduce.pruning.budget import Budget
        from keyreduce.pruning.planning import check_options, read_options

        method = method_named(request.method)
        given: dict[str, Any] = {"f": request.f, "form": request.form}
        given |= {"permute": request.permute or None, "include_queries": request.include_queries or None}
        given = {name: value for name, value in given.items() if value is not None}
        budget = Budget.of(
            request.target,
            ratio=request.ratio,
            keep=request.keep,
            variance=request.variance,
            allocate=request.allocate,
            multiple_of=request.multiple_of,
        )
        chosen = check_options(method, given | read_options(method, request.set))
        return cls(method, chosen, budget, request.engine, request.seed)

    @property
    def needs_statistics(self) -> bool:
        """Whether the calibration decides anything."""
        return self.method.needs_statistics or self.budget.needs_statistics

    def describe(self, source: "Checkpoint") -> dict:
        """Return what decides the result beside the model and the statistics, as a JSON object."""
        from keyreduce.pruning.prune import ALGORITHM

        return {
            "method": self.method.name,
            "options": dict(self.options),
            **self.budget.describe(source.config),
            "seed": self.seed,
            "algorithm": ALGORITHM,
            "method_version": self.method.version,
        }

    def check(self, source: "Checkpoint") -> None:
        """Refuse, before any work, what a model cannot have.

        Raises:
            KeyreduceError: the method cannot prune this model, its config cannot say such sizes, or the serving engine
                does not run them.
        """
        from keyreduce.pruning.planning import check_method

        self.budget.check(source.config, self.method)
        check_method(source, self.method, self.budget.targets)
        if self.engine is not None and not self.budget.needs_statistics:
            self._check_engine(source, self.budget.numbers(source.config, None, self.method, self.options))

    def plan(
        self, source: "Checkpoint", statistics: "Statistics | None", inputs: Mapping, reporter: Reporter
    ) -> "Plan":
        """Choose what stays of a model.

        Raises:
            KeyreduceError: see :func:`keyreduce.pruning.planning.make_plan`.
        """
        from keyreduce.pruning.planning import make_plan

        keep = self.budget.numbers(source.config, statistics, self.method, self.options)
        self._check_engine(source, keep)
        with reporter.progress("selecting", len(next(iter(keep.values()))), "layers") as progress:
            return make_plan(
                source,
                self.method,
                keep,
                seed=self.seed,
                statistics=statistics,
                inputs=inputs,
                options=self.options,
                progress=progress,
            )

    def _check_engine(self, source: "Checkpoint", keep: Mapping[str, Mapping[int, int]]) -> None:
        from keyreduce.families import family_of
        from keyreduce.pruning.budget import sizes_after
        from keyreduce.serving.engines import check_engine

        if self.engine is None:
            return
        family = family_of(source.config)
        before = family.layer_sizes(source.config)
        after = {
            layer: sizes_after(sizes, {target: number_of[layer] for target, number_of in keep.items()})
            for layer, sizes in before.items()
        }
        check_engine(self.engine, family, before, after)


def _recorded_inputs(folder: Path) -> dict | None:
    """Return what a pruned checkpoint was made from, recoveries included; None where there is none."""
    from keyreduce.checkpoint.record import Record

    record = Record.read(folder)
    if not record.steps:
        return None
    repairs = [[repair["inputs"]["mode"], repair["inputs"]["text"]["identity"]] for repair in record.repairs]
    return record.steps[-1]["inputs"] | ({"repairs": repairs} if repairs else {})


def _statistics(request: PruneRequest, source: "Checkpoint", gradients: bool, reporter: Reporter) -> "Statistics":
    """Return the calibration statistics, which are made from the text where none are named and none are there."""
    from keyreduce.api import calibrate
    from keyreduce.calibration.file import read_record, read_statistics
    from keyreduce.pruning.planning import check_calibration
    from keyreduce.workspace import Workspace

    path = request.calibration or Workspace(request.work).calibration
    if request.calibration is None and not path.exists():
        reporter.note(f"there are no calibration statistics at {path}: calibrating first")
        shared = ("model", "config", "text", "dataset", "dataset_config", "split", "device")
        given = {name: getattr(request, name) for name in shared}
        made = calibrate.run(calibrate.CalibrateRequest(output=path, gradients=gradients, **given), reporter)
        if made is not None:
            reporter.note(f"wrote {path}: {made.tokens:,} tokens, {made.layers} layers")
    check_calibration(source, read_record(path)["model"])
    statistics = read_statistics(path)
    try:
        statistics.check_finite()
    except KeyreduceError:
        raise KeyreduceError(
            f"{path} holds NaN or inf: it is damaged; make it again with keyreduce calibrate `overwrite`"
        ) from None
    return statistics


def _write(
    request: PruneRequest,
    source: "Checkpoint",
    plan: "Plan",
    folder: Path,
    shard_bytes: int | None,
    device: Any,
    reporter: Reporter,
) -> None:
    from keyreduce.checkpoint.find import model_name
    from keyreduce.checkpoint.memory import freed_tensors_returned
    from keyreduce.devices import dtype_named
    from keyreduce.processes import command_line
    from keyreduce.pruning.prune import write_pruned

    with freed_tensors_returned(), reporter.progress("writing", source.nbytes, "B") as progress:
        write_pruned(
            source,
            plan,
            folder,
            dense=model_name(request.model),
            dense_config=request.config,
            dtype=request.dtype and dtype_named(request.dtype),
            max_shard_size=shard_bytes,
            command=command_line(),
            verify=_verification(request, source, plan, device),
            overwrite=request.overwrite,
            progress=progress,
        )


def _verification(request: PruneRequest, source: "Checkpoint", plan: "Plan", device: Any) -> Callable | None:
    """Return what looks at the finished checkpoint before it appears."""
    if request.verify is None:
        return None
    if request.verify == "logits":
        from keyreduce.pruning.masked import check_logits  # with transformers and fla, which take seconds to import

        return lambda made: check_logits(source, made, plan, device=device, seed=request.seed)
    from keyreduce.models.meta import check_folder

    return check_folder


def _recover(request: PruneRequest, cut: Path, target: Path, reporter: Reporter) -> None:
    from keyreduce.api import recover

    shared = ("text", "dataset", "dataset_config", "split", "seed", "device", "overwrite")
    given = {name: getattr(request, name) for name in shared}
    recover.run(recover.RecoverRequest(mode=request.recover, compressed=str(cut), output=target, **given), reporter)


def _result(source: "Checkpoint", folder: Path, *, made: bool) -> PruneResult:
    """Return the result, from the checkpoint that was pruned, the one that is there, and its record."""
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.record import Record
    from keyreduce.families import MixerSizes, family_of
    from keyreduce.pruning.savings import savings
    from keyreduce.serving.engines import suited_engines

    pruned, record = open_folder(folder), Record.read(folder)
    family, saved = family_of(source.config), savings(source, pruned)
    layers = [list(family.layer_sizes(one.config).values()) for one in (source, pruned)]
    inputs = record.steps[-1]["inputs"]
    suited, unsuited = suited_engines(family, set(layers[1]))
    repairs = record.repairs
    figures: dict[str, Any] = {name: [_alike(name, sizes) for sizes in layers] for name in MixerSizes._fields}
    figures |= {name: list(values) for name, values in saved._asdict().items()}
    return PruneResult(
        pruned=folder,
        made=made,
        dense=record.dense or "",
        method=inputs["method"],
        target=inputs["target"],
        **figures,
        smaller=saved.sentence,
        suited_engines=suited,
        unsuited_engines=unsuited,
        repair={name: repairs[-1].get(name) for name in ("tokens", "seconds", "layers")}
        | {"mode": repairs[-1]["inputs"]["mode"]}
        if repairs
        else None,
    )


def _alike(name: str, layers: list) -> int | list[int]:
    """Return a size, or a list of one for each layer where they differ."""
    values = [getattr(layer, name) for layer in layers]
    return values[0] if len(set(values)) == 1 else values

"""Statistics and a checkpoint to a smaller checkpoint."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyreduce.api import options
from keyreduce.api.request import Result, option, specs
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.budget import DEFAULT_RATIO
from keyreduce.pruning.methods import METHODS, method_named, registered_elsewhere
from keyreduce.reporting import Reporter
from keyreduce.serving.engines import EngineName

if TYPE_CHECKING:
    from keyreduce.calibration.statistics import Statistics
    from keyreduce.checkpoint.source import Checkpoint
    from keyreduce.pruning.budget import Budget
    from keyreduce.pruning.methods import Method
    from keyreduce.pruning.plan import Plan

_SUMMARIES = {method.name: method.summary for method in METHODS.values()}
_SUMMARIES |= {name: f"from {point.value.split(':')[0]}" for name, point in registered_elsewhere().items()}
_METHOD_HELP = "\n\n".join(f"{name}: {summary}" for name, summary in _SUMMARIES.items())
_TEXT = tuple(specs(options.OfText))
_F, _FORM = str(METHODS["rrqr"].options["f"]), str(METHODS["taylor"].options["form"])
_OWN = {"panel": "Options of single methods"}
_TOKENS_A_CHANNEL = 8  # below it the note comes; calibrate takes 256 for each of 128 channels by default


@dataclass(frozen=True, kw_only=True)
class PruneRequest(options.OfRun, options.OfText, options.OfFiles):
    """Remove channels or heads, and write a checkpoint that fla and transformers load unchanged.

    Where a method needs calibration statistics and there are none, keyreduce calibrate runs first. The text is for that
    and for --recover, and --device for these two and for --verify.
    """

    model: str | None = options.model()
    work: Path = options.work()
    method: str = option("auto", _METHOD_HELP, env="PRUNING_STRATEGY", metavar="NAME")
    target: tuple[Literal["key", "value", "head"], ...] = option(
        ("key",), "What to remove: key or value channels, whole key heads, or several, with commas.", commas=True
    )
    ratio: tuple[str, ...] = option(
        (),
        "Share to remove: of each head's channels, of a layer's heads. One for each target, with commas.",
        env="PRUNING_RATIO",
        metavar="SHARE",
        shown_default=DEFAULT_RATIO,
        commas=True,
        instead_of=("keep", "variance"),
    )
    keep: tuple[str, ...] = option(
        (),
        "How many to keep, instead of --ratio.",
        metavar="NUMBER",
        flags=("--keep", "--rank"),
        commas=True,
        instead_of=("ratio", "variance"),
    )
    multiple_of: int = option(1, "Round kept channels to the nearest multiple.")
    allocate: Literal["uniform", "energy"] = option(
        "uniform",
        "Key channels: as many in each layer, or more where q and k have more energy (delta_net_2 only), at one total.",
    )
    calibration: Path | None = options.output("The calibration file.", metavar="FILE")
    output: Path | None = options.output("The pruned checkpoint.", env="OUTPUT_DIR")
    f: float | None = option(
        None, "rrqr: swap while one makes the kept block's volume more than f times as large.", shown_default=_F, **_OWN
    )
    permute: bool = option(False, "rrqr: shuffle ties, by --seed.", **_OWN)
    form: Literal["first", "squared", "element"] | None = option(
        None, "taylor: gradients summed with sign, squared (Fisher), or by weight.", shown_default=_FORM, **_OWN
    )
    include_queries: bool = option(False, "pca: the principal directions of q and k, not of k alone.", **_OWN)
    set: tuple[str, ...] = option(
        (), "Any option of a method, also of another package; may be repeated.", metavar="NAME=VALUE", **_OWN
    )
    variance: float | None = option(
        None,
        "pca: the smallest rank that keeps this share of the variance, instead of --ratio.",
        instead_of=("ratio", "keep"),
        **_OWN,
    )
    verify: Literal["logits", "load"] | None = option(
        None,
        "Check more before the result appears: load builds the library's own model for it, logits compares it with the "
        "dense model with the dropped channels masked.",
        shown_default="the mixers' tensors and shapes alone",
    )
    engine: EngineName | None = option(
        None, "Refuse sizes that this serving engine does not run.", shown_default="the result says which do"
    )
    recover: Literal["least-squares", "reconstruct"] | None = option(
        None,
        "Win quality back before the result appears, as keyreduce recover --mode does.",
        shown_default="left as it is cut",
    )
    config: Path | None = options.config()


@dataclass(frozen=True, kw_only=True)
class PruneResult(Result):
    """A pruned checkpoint. Where layers differ, a size is a list with one entry for each."""

    pruned: Path  # its folder.
    made: bool  # whether this run made it; else it was there already, from the same inputs.
    dense: str  # the model that it was made from, by the name it was given.
    # how it was chosen what to remove, and of what; targets with commas.
    method: str
    target: str
    # sizes before and after the cut.
    key_heads: list
    value_heads: list
    head_k_dim: list
    head_v_dim: list
    state_bytes_per_sequence: list[int]  # recurrent state of one sequence in all layers, in float32, before and after.
    # numbers of parameters, before and after.
    mixer_parameters: list[int]
    model_parameters: list[int]
    smaller: str  # the same as a sentence.
    # which serving engines run these sizes, and which do not, with their demand.
    suited_engines: list[str]
    unsuited_engines: list[str]
    pushed: str | None = None  # the address on the hub that it was uploaded to, if that was asked for.
    repair: dict | None = None  # mode, tokens, seconds and layers of the recovery that followed the cut, if one did.


def run(request: PruneRequest, reporter: Reporter = Reporter(), statistics: "Statistics | None" = None) -> PruneResult:
    """Prune a checkpoint, or leave the one that was made from the same inputs.

    ``statistics`` are taken in the place of those of the calibration file.

    Raises:
        KeyreduceError: there is no such model or method, they do not go together, the amounts are impossible, the
            statistics are of another model, or the output is there from other inputs, or cannot be written.
    """
    from keyreduce.checkpoint.find import open_model
    from keyreduce.devices import pick_device
    from keyreduce.outputs import claimed, is_already_made, refuse_source
    from keyreduce.workspace import Workspace

    cut = Cut.of(request)
    run_on = pick_device(request.device)  # a wrong one is refused even where nothing is left to calibrate
    files = request.file_settings
    source = open_model(request.model, config=request.config)
    if request.dtype is None and source.shards is None:
        source.refuse_other_dtype()  # pyright: ignore[reportAttributeAccessIssue]  (DCPs alone have no shards)
    cut.check(source)
    text = request.text_source("calibration")
    target = request.output or Workspace(request.work).pruned
    refuse_source(target, Path(request.model) if request.model and os.path.isdir(request.model) else source.path)
    inputs = {"source": source.identity, **cut.describe(source), **files}
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
            _write(request, source, plan, folder, run_on, reporter)
            if request.recover:
                from keyreduce.api import recover

                own = {"mode": request.recover, "compressed": str(folder), "output": target}
                given = {name: getattr(request, name) for name in (*_TEXT, "seed", "device", "overwrite")}
                recover.run(recover.RecoverRequest(**own, **given), reporter)
    return _result(source, target, made, request.pushed(target))


@dataclass(frozen=True)
class Cut:
    """What a request asks to remove, checked as far as it can be without a model."""

    method: "Method"  # what chooses.
    options: Mapping[str, object]  # all of its options.
    budget: "Budget"  # how much stays.
    engine: EngineName | None  # the serving engine that must run the sizes, if any.
    seed: int  # of what is drawn.

    @classmethod
    def of(cls, request: PruneRequest) -> "Cut":
        """Return what a request asks for; refuse a method or option that does not exist, and impossible amounts."""
        from keyreduce.pruning.budget import Budget
        from keyreduce.pruning.planning import check_options, read_options

        method = method_named(request.method)
        given = {name: getattr(request, name) for name in ("f", "form", "permute", "include_queries")}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        amounts = ("ratio", "keep", "variance", "allocate", "multiple_of")
        budget = Budget.of(request.target, **{name: getattr(request, name) for name in amounts})
        chosen = check_options(method, given | read_options(method, request.set))
        return cls(method, chosen, budget, request.engine, request.seed)

    @property
    def needs_statistics(self) -> bool:
        """Whether the calibration decides anything."""
        return self.method.needs_statistics or self.budget.needs_statistics

    def describe(self, source: "Checkpoint") -> dict:
        """Return what decides the result beside the model and the statistics, as a JSON object."""
        from keyreduce.pruning.prune import ALGORITHM

        chosen = {"method": self.method.name, "options": dict(self.options), **self.budget.describe(source.config)}
        return chosen | {"seed": self.seed, "algorithm": ALGORITHM, "method_version": self.method.version}

    def check(self, source: "Checkpoint") -> None:
        """Refuse, before any work, a method that cannot prune this model, and sizes that its config cannot say or that
        the serving engine does not run.
        """
        from keyreduce.pruning.planning import check_method

        self.budget.check(source.config, self.method)
        check_method(source, self.method, self.budget.targets)
        if self.engine is not None and not self.budget.needs_statistics:
            self._check_engine(source, self.budget.numbers(source.config, None, self.method, self.options))

    def plan(
        self, source: "Checkpoint", statistics: "Statistics | None", inputs: Mapping, reporter: Reporter
    ) -> "Plan":
        """Choose what stays of a model; for the errors see :func:`keyreduce.pruning.planning.make_plan`."""
        from keyreduce.pruning.planning import make_plan

        keep = self.budget.numbers(source.config, statistics, self.method, self.options)
        self._check_engine(source, keep)
        if statistics is not None and self.needs_statistics:
            _check_tokens(source, statistics.tokens, keep, reporter)
        with reporter.progress("selecting", len(next(iter(keep.values()))), "layers") as progress:
            given: dict[str, Any] = {"seed": self.seed, "statistics": statistics, "inputs": inputs}
            return make_plan(source, self.method, keep, options=self.options, progress=progress, **given)

    def _check_engine(self, source: "Checkpoint", keep: Mapping[str, Mapping[int, int]]) -> None:
        from keyreduce.families import family_of
        from keyreduce.pruning.budget import sizes_after
        from keyreduce.serving.engines import check_engine

        if self.engine is None:
            return
        family, after = family_of(source.config), {}
        before = family.layer_sizes(source.config)
        for layer, sizes in before.items():
            after[layer] = sizes_after(sizes, {target: number_of[layer] for target, number_of in keep.items()})
        check_engine(self.engine, family, before, after)


def _check_tokens(
    source: "Checkpoint", tokens: int, keep: Mapping[str, Mapping[int, int]], reporter: Reporter
) -> None:
    """Refuse statistics of fewer tokens than channels that stay, and say where they are few."""
    from keyreduce.families import family_of
    from keyreduce.pruning.budget import SIZE_OF

    pairs = [
        (number_of[layer], getattr(sizes, SIZE_OF[target]))
        for layer, sizes in family_of(source.config).layer_sizes(source.config).items()
        for target, number_of in keep.items()
        if target != "head" and number_of[layer] < getattr(sizes, SIZE_OF[target])
    ]
    kept, channels = max(pairs, default=(0, 0))
    # So many tokens span no more directions than they are.
    if tokens < kept:
        raise KeyreduceError(
            f"the calibration statistics are of {tokens:,} tokens, too few to choose {kept} of {channels} channels by; "
            "calibrate on more text (keyreduce calibrate `overwrite`)"
        )
    if tokens < _TOKENS_A_CHANNEL * channels:
        reporter.note(
            f"the calibration statistics are of {tokens:,} tokens alone, to choose {kept} of {channels} channels by: "
            f"calibrate on more text, {_TOKENS_A_CHANNEL * channels:,} tokens at least"
        )


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
        given = {name: getattr(request, name) for name in (*_TEXT, "model", "config", "device")}
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
    request: PruneRequest, source: "Checkpoint", plan: "Plan", folder: Path, device: Any, reporter: Reporter
) -> None:
    from keyreduce.checkpoint.find import model_name
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.memory import freed_tensors_returned
    from keyreduce.devices import dtype_named
    from keyreduce.processes import command_line
    from keyreduce.pruning.prune import write_pruned

    def verify(made: Path) -> None:
        # Both import transformers and fla, which takes seconds.
        if request.verify == "logits":
            from keyreduce.pruning.masked import check_logits

            check_logits(source, made, plan, device=device, seed=request.seed)
        elif request.verify == "load":
            from keyreduce.models.meta import check_source

            check_source(open_folder(made))

    files = request.file_settings
    if request.dtype:
        files["dtype"] = dtype_named(request.dtype)
    named = {"dense": model_name(request.model), "dense_config": request.config, "command": command_line()}
    with freed_tensors_returned(), reporter.progress("writing", source.nbytes, "B") as progress:
        overwrite = request.overwrite
        write_pruned(source, plan, folder, **named, **files, verify=verify, overwrite=overwrite, progress=progress)


def _result(source: "Checkpoint", folder: Path, made: bool, pushed: str | None) -> PruneResult:
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
    figures: dict[str, Any] = {name: list(values) for name, values in saved._asdict().items()}
    for name in MixerSizes._fields:
        values = [[getattr(layer, name) for layer in sizes] for sizes in layers]
        figures[name] = [one[0] if len(set(one)) == 1 else one for one in values]
    figures["suited_engines"], figures["unsuited_engines"] = suited_engines(family, set(layers[1]))
    if record.repairs:
        last = record.repairs[-1]
        figures["repair"] = {name: last.get(name) for name in ("tokens", "seconds", "layers")}
        figures["repair"]["mode"] = last["inputs"]["mode"]
    figures |= {"smaller": saved.sentence, "method": inputs["method"], "target": inputs["target"]}
    return PruneResult(pruned=folder, made=made, dense=record.dense or "", pushed=pushed, **figures)

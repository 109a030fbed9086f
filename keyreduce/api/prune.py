"""Statistics and a checkpoint to a smaller checkpoint."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from keyreduce.api import options
from keyreduce.api.request import Result, option, specs
from keyreduce.errors import KeyreduceError
from keyreduce.pruning.budget import DEFAULT_RATIO, SIZE_OF
from keyreduce.pruning.methods import METHODS, method_named, registered_elsewhere
from keyreduce.pruning.state_budget import DEFAULT_STATE_RATIO, SearchMode
from keyreduce.recovery import modes
from keyreduce.recovery.modes import LayerMode
from keyreduce.reporting import Reporter
from keyreduce.serving.engines import EngineName
from keyreduce.serving.state_formats import StateDtype

if TYPE_CHECKING:
    from keyreduce.calibration.statistics import Statistics
    from keyreduce.checkpoint.source import Checkpoint
    from keyreduce.pruning.budget import Budget
    from keyreduce.pruning.methods import Method
    from keyreduce.pruning.plan import Plan
    from keyreduce.pruning.search import Found
    from keyreduce.pruning.state_budget import StateBudget

_NAMES = (*METHODS, *registered_elsewhere())
_METHOD_HELP = f"What chooses: {', '.join(_NAMES)}; keyreduce methods says more."
_TEXT = tuple(specs(options.OfText))
_F, _FORM = str(METHODS["rrqr"].options["f"]), str(METHODS["taylor"].options["form"])
# Options of single methods; the help of prune leaves them to keyreduce methods.
_OWN = {"hidden": True}
_CUT = {"panel": "What to cut"}
_TOKENS_A_CHANNEL = 8  # below it the note comes; calibrate takes 256 for each of 128 channels by default


@dataclass(frozen=True, kw_only=True)
class PruneRequest(options.OfRun, options.OfText, options.OfFiles):
    """Remove channels or heads; fla and transformers load the result unchanged.

    Where there are no calibration statistics, keyreduce calibrate runs first. The text is for that and for --recover.
    """

    model: str | None = options.model()
    work: Path = options.work()
    method: str = option("auto", _METHOD_HELP, env="PRUNING_STRATEGY", metavar="NAME")
    state_ratio: str | None = option(
        None,
        "Share of the state's bytes to remove; what goes is chosen for the least loss.",
        env="STATE_RATIO",
        metavar="SHARE",
        shown_default=f"{DEFAULT_STATE_RATIO} if nothing else is given",
        instead_of=("state_bytes", "fit", "ratio", "keep", "variance"),
        **_CUT,
    )
    state_bytes: str | None = option(
        None,
        "Bytes that a sequence's state may take: 36MiB.",
        metavar="SIZE",
        instead_of=("state_ratio", "fit", "ratio", "keep", "variance"),
        **_CUT,
    )
    fit: str | None = option(
        None,
        "Memory of a GPU, tokens of a sequence, sequences: 80GB,4096,200.",
        metavar="M,T,S",
        instead_of=("state_ratio", "state_bytes", "ratio", "keep", "variance"),
        **_CUT,
    )
    state_dtypes: tuple[StateDtype, ...] = option(
        ("float32",), "Formats that the engine can keep the state in.", commas=True, metavar="NAME,...", **_CUT
    )
    search: SearchMode | None = option(
        None,
        "predicted: compare by statistics; measured: the best few on other text.",
        shown_default="measured on a GPU or if small",
    )
    dry_run: bool = option(False, "Show what was considered, and write no checkpoint.", **options.OUTPUT)
    target: tuple[Literal["key", "value", "head"], ...] = option(
        (),
        "Key or value channels, whole key heads, or several.",
        commas=True,
        shown_default="key; for --state-ratio all",
        **_CUT,
    )
    ratio: tuple[str, ...] = option(
        (),
        "Share to remove of each head's channels, or of the heads: one for each target.",
        env="PRUNING_RATIO",
        metavar="SHARE",
        shown_default=f"{DEFAULT_RATIO} with --target or --method",
        commas=True,
        **_CUT,
        instead_of=("keep", "variance", "state_ratio", "state_bytes", "fit"),
    )
    keep: tuple[str, ...] = option(
        (),
        "How many to keep, instead of --ratio.",
        metavar="N",
        flags=("--keep", "--rank"),
        commas=True,
        **_CUT,
        instead_of=("ratio", "variance", "state_ratio", "state_bytes", "fit"),
    )
    multiple_of: int = option(1, "Round kept channels to the nearest multiple.", **_CUT)
    allocate: Literal["uniform", "energy"] = option(
        "uniform", "energy: more key channels where q and k have more energy (delta_net_2)."
    )
    calibration: Path | None = options.output("The calibration file.", metavar="FILE", flags=())
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
        (), "An option of a method (keyreduce methods); may be repeated.", metavar="NAME=VALUE"
    )
    variance: float | None = option(
        None,
        "pca: the smallest rank that keeps this share of the variance.",
        instead_of=("ratio", "keep", "state_ratio", "state_bytes", "fit"),
        **_CUT,
    )
    verify: Literal["logits", "load"] | None = option(
        None,
        "load: build the library's model of it; logits: also compare it with the masked dense one.",
        shown_default="shapes alone",
        **options.OUTPUT,
    )
    engine: EngineName | None = option(
        None,
        "Refuse sizes that this serving engine does not run; vllm-plugin: vLLM beside which keyreduce is installed.",
        **_CUT,
    )
    recover: LayerMode | None = option(
        None, f"Win quality back, as keyreduce recover does; auto: {modes.AUTO_SUMMARY}."
    )
    uncorrected: bool = option(False, "Leave what stays as it was; else statistics correct what a cut enlarges.")
    config: Path | None = options.config()

    @property
    def budget(self) -> "StateBudget | None":
        """The budget for the state, if one is given, or nothing else says what to remove.

        Raises KeyreduceError if it is given in two ways, or contradicts other fields.
        """
        from keyreduce.pruning.state_budget import StateBudget

        amounts = {name: getattr(self, name) for name in ("state_ratio", "state_bytes", "fit")}
        given = [name for name, amount in amounts.items() if amount is not None]
        by_hand = [name for name in ("ratio", "keep", "variance") if getattr(self, name) not in (None, ())]
        if given and by_hand:
            raise KeyreduceError(f"`{given[0]}` chooses what to remove, and `{by_hand[0]}` says it: give one of them")
        named = self.method != "auto" or self.target or self.allocate != "uniform"
        if not given and (by_hand or named):
            asked = [name for name in ("dry_run", "search") if getattr(self, name)]
            if asked or self.state_dtypes != ("float32",):
                raise KeyreduceError(f"`{(*asked, 'state_dtypes')[0]}` goes with a budget: give `state_ratio`")
            return None
        if self.allocate != "uniform":
            raise KeyreduceError("`allocate` goes with `ratio` or `keep`; a budget gives all layers the same sizes")
        amounts["state_ratio"] = amounts["state_ratio"] if given else DEFAULT_STATE_RATIO
        able = tuple(target for target in SIZE_OF if target in method_named(self.method).select)
        return StateBudget.of(
            ratio=amounts["state_ratio"],
            bytes=self.state_bytes,
            fit=self.fit,
            dtypes=self.state_dtypes,
            targets=self.target or able,
            multiple_of=self.multiple_of if self.multiple_of > 1 else None,
            engine=self.engine,
        )

    def resolved(self, device_type: str) -> Self:
        """Return the request with the mode of recovery that ``auto`` is on a type of device."""
        return replace(self, recover=self.recover and modes.resolve_mode(self.recover, device_type))


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
    generation: str | None = None  # with which versions fla's own models generate right; None where there is no doubt.
    pushed: str | None = None  # the address on the hub that it was uploaded to, if that was asked for.
    repair: dict | None = None  # mode, tokens, seconds and layers of the recovery that followed the cut, if one did.
    # for a budget what was considered, and its picture: :meth:`keyreduce.pruning.search.Found.to_json`. It is missing
    # where the output was there already.
    state_budget: dict | None = None


@dataclass(frozen=True, kw_only=True)
class DryRunResult(Result):
    """What a budget would come to; nothing was pruned."""

    report: Path  # the file that holds what was considered; the picture lies beside it.
    dense: str  # the model.
    state_budget: dict  # see :class:`PruneResult`.


def run(
    request: PruneRequest, reporter: Reporter = Reporter(), statistics: "Statistics | None" = None
) -> PruneResult | DryRunResult:
    """Prune a checkpoint, or leave the one that was made from the same inputs.

    ``statistics`` are taken in the place of those of the calibration file. Of a ``dry_run`` the result is another one.

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
    is_auto, request = request.recover == modes.AUTO, request.resolved(run_on.type)
    files = request.file_settings
    source = open_model(request.model, config=request.config)
    if request.dtype is None and source.shards is None:
        source.refuse_other_dtype()  # pyright: ignore[reportAttributeAccessIssue]  (DCPs alone have no shards)
    cut.check(source)
    text = request.text_source("calibration")
    if is_auto:
        assert request.recover is not None
        reporter.note(modes.auto_note(request.recover))
    if request.dry_run:
        found = cut.search(request, source, statistics or _statistics(request, source, cut, reporter), reporter)
        report = _write_search(request, source, found)
        return DryRunResult(report=report, dense=str(source.path), state_budget=found.to_json())
    target = request.output or Workspace(request.work).pruned
    refuse_source(target, Path(request.model) if request.model and os.path.isdir(request.model) else source.path)
    inputs = {"source": source.identity, **cut.describe(source), **files}
    wanted = {"repairs": [[request.recover, text.identity]]} if request.recover else {}
    searched = None
    with claimed(target, folder=True) as claim:
        recorded = None if request.overwrite else _recorded_inputs(target)
        # What differs already is refused before calibration, which takes time and leaves a file.
        comparable = recorded and {name: value for name, value in recorded.items() if name != "calibration"}
        is_already_made(target, comparable, inputs | wanted, request.overwrite)
        if cut.needs_statistics:
            statistics = statistics or _statistics(request, source, cut, reporter)
            # Gradients leave the other statistics as they are.
            without = () if cut.method.needs_gradients else ("gradients",)
            inputs["calibration"] = {name: value for name, value in statistics.inputs.items() if name not in without}
        made = not is_already_made(target, recorded, inputs | wanted, request.overwrite)
        if made:
            if cut.state_budget is not None:
                assert statistics is not None  # such a cut needs them
                searched = cut.search(request, source, statistics, reporter)
                _write_search(request, source, searched)
            plan = cut.plan(source, statistics, inputs, reporter, searched)
            folder = claim.scratch / "cut" if request.recover else target
            _write(request, source, plan, folder, run_on, reporter)
            if request.recover:
                from keyreduce.api import recover

                own = {"mode": request.recover, "compressed": str(folder), "output": target}
                given = {name: getattr(request, name) for name in (*_TEXT, "seed", "device", "overwrite")}
                recover.run(recover.RecoverRequest(**own, **given), reporter)
    reporter.keep(f"the pruned model, {target}")
    return _result(source, target, made, request.pushed(target), searched)


@dataclass(frozen=True)
class Cut:
    """What a request asks to remove, checked as far as it can be without a model."""

    method: "Method"  # what chooses.
    options: Mapping[str, object]  # all of its options.
    budget: "Budget | None"  # how much stays; None where a budget for the state decides that.
    state_budget: "StateBudget | None"  # the budget for the state.
    engine: EngineName | None  # the serving engine that must run the sizes, if any.
    seed: int  # of what is drawn.
    correct: bool  # whether the statistics correct what the cut enlarges.

    @classmethod
    def of(cls, request: PruneRequest) -> "Cut":
        """Return what a request asks for; refuse a method or option that does not exist, and impossible amounts."""
        from keyreduce.pruning.budget import Budget
        from keyreduce.pruning.planning import check_options, read_options

        method = method_named(request.method)
        given = {name: getattr(request, name) for name in ("f", "form", "permute", "include_queries")}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        amounts = {name: getattr(request, name) for name in ("ratio", "keep", "variance", "allocate", "multiple_of")}
        of_state = request.budget
        budget = Budget.of(request.target or ("key",), **amounts) if of_state is None else None
        chosen = check_options(method, given | read_options(method, request.set))
        correct = not request.uncorrected and request.recover is None
        return cls(method, chosen, budget, of_state, request.engine, request.seed, correct)

    @property
    def needs_statistics(self) -> bool:
        """Whether the calibration decides anything."""
        return self.method.needs_statistics or self.budget is None or self.budget.needs_statistics

    def describe(self, source: "Checkpoint") -> dict:
        """Return what decides the result beside the model and the statistics, as a JSON object."""
        from keyreduce.pruning.prune import ALGORITHM, CORRECTION

        chosen = {"method": self.method.name, "options": dict(self.options)}
        if self.budget is not None:
            chosen |= self.budget.describe(source.config)
        elif self.state_budget is not None:
            chosen |= {"target": ",".join(self.state_budget.targets), "keep": self.state_budget.describe()}
        if self.correct and self.needs_statistics:
            chosen |= {"corrected": CORRECTION}
        return chosen | {"seed": self.seed, "algorithm": ALGORITHM, "method_version": self.method.version}

    def check(self, source: "Checkpoint") -> None:
        """Refuse, before any work, a method that cannot prune this model, and sizes that its config cannot say or that
        the serving engine does not run.
        """
        from keyreduce.pruning.planning import check_method
        from keyreduce.pruning.state_budget import find_candidates

        if self.budget is None:
            assert self.state_budget is not None  # one of the two says how much stays
            check_method(source, self.method, list(self.state_budget.targets))
            find_candidates(source, self.state_budget)
            return
        self.budget.check(source.config, self.method)
        check_method(source, self.method, self.budget.targets)
        if self.engine is not None and not self.budget.needs_statistics:
            self._check_engine(source, self.budget.numbers(source.config, None, self.method, self.options))

    def search(
        self, request: PruneRequest, source: "Checkpoint", statistics: "Statistics", reporter: Reporter
    ) -> "Found":
        """Find the sizes that lose least within the budget."""
        from keyreduce.devices import pick_device
        from keyreduce.pruning.search import Search

        assert self.state_budget is not None
        # The choice may leave nearly all of them.
        whole = max(_channels(source, self.state_budget.targets).values(), default=0)
        _check_tokens(statistics.tokens, whole, whole, reporter)
        return Search(
            source=source,
            statistics=statistics,
            text=request.text_source("calibration"),
            budget=self.state_budget,
            method=self.method,
            options=self.options,
            seed=self.seed,
            correct=self.correct,
            recovery=request.recover,
            mode=request.search,
            device=pick_device(request.device),
        ).run(reporter)

    def plan(
        self,
        source: "Checkpoint",
        statistics: "Statistics | None",
        inputs: Mapping,
        reporter: Reporter,
        found: "Found | None" = None,
    ) -> "Plan":
        """Choose what stays of a model, of a budget for the state what was ``found``.

        For the errors see :func:`keyreduce.pruning.planning.make_plan`.
        """
        from keyreduce.families import family_of
        from keyreduce.pruning.planning import make_plan

        if found is not None:
            keep = found.keep
        else:
            assert self.budget is not None  # for a budget of the state there is something found
            keep = self.budget.numbers(source.config, statistics, self.method, self.options)
            self._check_engine(source, keep)
            if statistics is not None and self.needs_statistics:
                channels = _channels(source, keep)
                pairs = [(keep[target][layer], size) for (target, layer), size in channels.items()]
                kept, size = max(((kept, size) for kept, size in pairs if kept < size), default=(0, 0))
                _check_tokens(statistics.tokens, kept, size, reporter)
        layers = family_of(source.config).mixer_layers(source.config)
        with reporter.progress("selecting", len(layers), "layers") as progress:
            given: dict[str, Any] = {"seed": self.seed, "statistics": statistics, "inputs": inputs}
            given |= {"options": self.options, "correct": self.correct}
            return make_plan(source, self.method, keep, progress=progress, **given)

    def _check_engine(self, source: "Checkpoint", keep: Mapping[str, Mapping[int, int]]) -> None:
        from keyreduce.families import family_of
        from keyreduce.pruning.budget import sizes_after
        from keyreduce.serving.engines import check_engine

        if self.engine is None:
            return
        family, after = family_of(source.config), {}
        for layer, sizes in family.layer_sizes(source.config).items():
            after[layer] = sizes_after(sizes, {target: number_of[layer] for target, number_of in keep.items()})
        check_engine(self.engine, source.config, after)


def _write_search(request: PruneRequest, source: "Checkpoint", found: "Found") -> Path:
    """Write what was considered, and its picture, into the work folder, and return the file."""
    from keyreduce.devices import device_name, pick_device
    from keyreduce.drawing import joined, text_words
    from keyreduce.pruning.search import write_search
    from keyreduce.workspace import Workspace

    path = Workspace(request.work).state_budget
    about = joined(text_words(request.text_source("calibration").describe()), device_name(pick_device(request.device)))
    write_search(found, path, model=source.path.name, about=about)
    return path


def _channels(source: "Checkpoint", targets: Iterable[str]) -> dict[tuple[str, int], int]:
    """Return (target, layer) -> how many channels a head has, of the targets that are channels."""
    from keyreduce.families import family_of
    from keyreduce.pruning.budget import SIZE_OF

    layers = family_of(source.config).layer_sizes(source.config).items()
    channels = [target for target in targets if target != "head"]
    return {(target, layer): getattr(sizes, SIZE_OF[target]) for layer, sizes in layers for target in channels}


def _check_tokens(tokens: int, kept: int, channels: int, reporter: Reporter) -> None:
    """Refuse statistics of fewer tokens than channels that stay, and say where they are few."""
    what = f"to choose {kept} of {channels} channels by" if kept < channels else f"to choose among {channels} channels"
    # So many tokens span no more directions than they are.
    if tokens < kept:
        raise KeyreduceError(
            f"the calibration statistics are of {tokens:,} tokens, too few {what}; "
            "calibrate on more text (keyreduce calibrate `overwrite`)"
        )
    if tokens < _TOKENS_A_CHANNEL * channels:
        reporter.note(
            f"the calibration statistics are of {tokens:,} tokens alone, {what}: "
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


def _statistics(request: PruneRequest, source: "Checkpoint", cut: Cut, reporter: Reporter) -> "Statistics":
    """Return the calibration statistics, which are made from the text where none are named and none are there."""
    from keyreduce.api import calibrate
    from keyreduce.calibration.file import read_record, read_statistics
    from keyreduce.pruning.planning import check_calibration
    from keyreduce.workspace import Workspace

    path, gradients = request.calibration or Workspace(request.work).calibration, cut.method.needs_gradients
    if request.calibration is None and not path.exists():
        reporter.note(f"there are no calibration statistics at {path}: calibrating first")
        given = {name: getattr(request, name) for name in (*_TEXT, "model", "config", "device")}
        made = calibrate.run(calibrate.CalibrateRequest(output=path, gradients=gradients, **given), reporter)
        if made is not None:
            reporter.note(f"wrote {path}: {made.tokens:,} tokens, {made.layers} layers")
            reporter.keep(f"the statistics, {path}")
    check_calibration(source, read_record(path)["model"])
    statistics = read_statistics(path)
    try:
        statistics.check_finite()
    except KeyreduceError:
        raise KeyreduceError(
            f"{path} holds NaN or inf: it is damaged; make it again with keyreduce calibrate `overwrite`"
        ) from None
    try:
        statistics.check_seen()
    except KeyreduceError as error:
        raise KeyreduceError(f"{path}: {error}; make it again with keyreduce calibrate `overwrite`") from None
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


def _result(
    source: "Checkpoint", folder: Path, made: bool, pushed: str | None, searched: "Found | None"
) -> PruneResult:
    """Return the result, from the checkpoint that was pruned, the one that is there, and its record."""
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.record import Record
    from keyreduce.families import MixerSizes, family_of
    from keyreduce.pruning.savings import savings
    from keyreduce.serving.engines import suited_engines
    from keyreduce.versions import generation_note

    pruned, record = open_folder(folder), Record.read(folder)
    family, saved = family_of(source.config), savings(source, pruned)
    layers = [list(family.layer_sizes(one.config).values()) for one in (source, pruned)]
    inputs = record.steps[-1]["inputs"]
    figures: dict[str, Any] = {name: list(values) for name, values in saved._asdict().items()}
    for name in MixerSizes._fields:
        values = [[getattr(layer, name) for layer in sizes] for sizes in layers]
        figures[name] = [one[0] if len(set(one)) == 1 else one for one in values]
    suited = suited_engines(family, set(layers[1]), pruned.config)
    figures["suited_engines"], figures["unsuited_engines"] = suited
    if record.repairs:
        last = record.repairs[-1]
        figures["repair"] = {name: last.get(name) for name in ("tokens", "seconds", "layers")}
        figures["repair"]["mode"] = last["inputs"]["mode"]
    figures |= {"smaller": saved.sentence, "method": inputs["method"], "target": inputs["target"]}
    if searched is not None:
        figures["state_budget"] = searched.to_json()
    figures["generation"] = generation_note(family.shipped_by)
    return PruneResult(pruned=folder, made=made, dense=record.dense or "", pushed=pushed, **figures)

"""A pruned model and text to the same model with some of its quality won back."""

import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from keyreduce.api import options
from keyreduce.api.request import Result, option
from keyreduce.errors import KeyreduceError
from keyreduce.processes import Processes, command_line
from keyreduce.recovery import modes
from keyreduce.recovery.modes import MODES, RATES, REPEATS, TRAINING_MODES, Kernels, Mode, Scope, Steps, Training
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    import torch

    from keyreduce.calibration.run import Settings
    from keyreduce.checkpoint.source import Checkpoint
    from keyreduce.data.text import TextSource
    from keyreduce.recovery.layers import Recovered

_SUMMARIES = {modes.AUTO: modes.AUTO_SUMMARY} | MODES | TRAINING_MODES
_MODE_HELP = "\n\n".join(f"{name}: {summary}" for name, summary in _SUMMARIES.items())
_RECONSTRUCT = {"panel": "reconstruct"}
_TRAINING = {"panel": "lora and full"}
_RATES = ", ".join(f"{mode} {rate:g}" for mode, rate in RATES.items())
_AMOUNT = f"{modes.BATCHES}; for reconstruct on a GPU {modes.GPU_TOKENS:,} tokens"
_STEPS = f"{modes.PASSES} passes, {modes.LEAST_STEPS} to {modes.MOST_STEPS}"
_DEFAULTS = {name: str(value) for name, value in (Training(lr=0.0)._asdict() | Steps()._asdict()).items()}


def _setting(name: str, help: str, **settings: Any) -> Any:
    """Declare a setting of single modes, whose default :mod:`keyreduce.recovery.modes` has."""
    return option(None, help, **{"shown_default": _DEFAULTS[name].removesuffix(".0")} | settings)


@dataclass(frozen=True, kw_only=True)
class RecoverRequest(options.OfRun, options.OfText, options.OfPair, options.Uploaded):
    """Win quality back after pruning. Sizes and config stay as pruned.

    least-squares and reconstruct go layer by layer, from the bottom up: each is fitted to what the dense model's layer
    gives, on the hidden states of the recovered layers below it. Their rows are spread over up to eight times as much
    text. lora and full train the whole model: --num-batches steps of --batch-size rows, in one process or under
    torchrun.
    """

    mode: Mode = option(modes.AUTO, _MODE_HELP)
    compressed: str | None = option(
        None, "The pruned model to recover.", **options.COMPRESSED | {"shown_default": "what prune wrote into --work"}
    )
    model: str | None = option(
        None, "The dense model.", shown_default="what was pruned", instead_of=("teacher",), **options.MODEL
    )
    teacher: str | None = option(
        None,
        "For lora and full: a model of the same vocabulary to learn from.",
        metavar="PATH|NAME",
        shown_default="the text alone",
    )
    output: Path | None = options.output("The recovered checkpoint.")
    heldout: tuple[Path, ...] = option(
        (), "Other text, to measure perplexity before and after; may be repeated.", metavar="FILE|FOLDER", panel="Text"
    )
    num_batches: int | None = options.num_batches(None, shown_default=_AMOUNT)
    batch_size: int = options.batch_size(8)
    seq_len: int = options.seq_len(512)
    repeats: float | None = option(
        None,
        "Share of rows that repeat random tokens, which keeps recall; not for lora and full.",
        metavar="SHARE",
        shown_default=f"{REPEATS:g}",
    )
    steps: int | None = _setting("steps", "Steps a layer.", shown_default=_STEPS, **_RECONSTRUCT | {"minimum": 1})
    lr: float | None = option(None, "Highest learning rate.", shown_default=_RATES)
    scope: Scope | None = _setting(
        "scope", "What is fitted: the mixer to the dense block or mixer, or mixer and MLP to the block.", **_RECONSTRUCT
    )
    distill_weight: float | None = _setting(
        "distill_weight",
        "Share of the loss that compares with the teacher: without --teacher the dense model.",
        shown_default=f"{Training(0).distill_weight:g} with --teacher",
        **_TRAINING | {"minimum": 0, "maximum": 1},
    )
    temperature: float | None = _setting("temperature", "Divisor of the logits compared.", **_TRAINING)
    warmup: float | None = _setting("warmup", "Share of steps with a rising rate.", **_TRAINING)
    micro_batch: int | None = _setting(
        "micro_batch",
        "Rows that a device takes at a time.",
        shown_default="its share of --batch-size",
        **_TRAINING | {"minimum": 1},
    )
    gradient_checkpointing: bool = option(False, "Compute activations twice, and keep fewer.", **_TRAINING)
    shard: bool = option(False, "FSDP: shard weights and optimizer over processes.", **_TRAINING)
    save_every: int | None = _setting(
        "save_every",
        "Steps between checkpoints, from which it resumes.",
        shown_default="a tenth of --num-batches",
        **_TRAINING | {"minimum": 1},
    )
    kernels: Kernels | None = _setting("kernels", "keyreduce's PyTorch, or fla's Triton kernels.", **_TRAINING)
    lora_rank: int | None = _setting("lora_rank", "lora: rank of the additions.", minimum=1, **_TRAINING)
    lora_alpha: float | None = _setting("lora_alpha", "lora: their scale, times rank.", **_TRAINING)
    lora_targets: tuple[str, ...] = option(
        (),
        "lora: linear layers that get one; may be repeated.",
        metavar="NAME",
        shown_default="q, k and v",
        **_TRAINING,
    )

    @property
    def trains(self) -> bool:
        """Whether the mode trains the whole model."""
        return self.mode in TRAINING_MODES

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of single modes that were given: name -> value."""
        values = {name: getattr(self, name) for name in modes.SETTINGS}
        return {name: value for name, value in values.items() if not (value is None or value is False or value == ())}

    def resolved(self, device_type: str) -> Self:
        """Return the request with the mode that ``auto`` is on a type of device.

        Raises KeyreduceError if that mode has no such setting.
        """
        return replace(self, mode=modes.resolve_mode(self.mode, device_type, self.settings))

    def amount(self, device_type: str, width: int) -> "Settings":
        """Return how much text a resolved request takes for a model of so many hidden channels."""
        from keyreduce.calibration.run import Settings

        number = self.num_batches
        if number is None:
            number = modes.default_batches(self.mode, device_type, self.batch_size * self.seq_len, width)
        return Settings(number, self.batch_size, self.seq_len, self.seed)


@dataclass(frozen=True, kw_only=True)
class RecoverResult(Result):
    """A recovered checkpoint."""

    recovered: Path  # its folder.
    # whether this run made it; else it was there already, from the same inputs, and the figures are those of the
    # run that made it.
    made: bool
    mode: str  # the mode that made it.
    pruned: Path  # the folder of the pruned model.
    dense: str | None  # the dense model; None where it is not known, nor needed by the mode.
    teacher: Path | None = None  # the folder of the model that lora or full learned from, if there was one.
    tokens: int  # the number of tokens that were used.
    seconds: float  # how long it took.
    # layer -> figures: ``ridge``, the strength of the regression; ``missing_before`` and ``missing_after``, the
    # share of the squares of the dense mixer's output that is missing before and after it; with reconstruct also
    # ``steps``, ``missing_reconstructed``, the same after these gradient steps, and ``error_first`` and
    # ``error_last``, the relative error of what they fit, averaged over their first and last sixteenth. None for lora
    # and full.
    layers: dict[str, dict[str, float]] | None = None
    trained_parameters: int | None = None  # how many parameters lora or full trained.
    passes: int | None = None  # the number of passes through the text that it began.
    # its loss, averaged over the first and the last twentieth of the log, nats per token.
    loss_first: float | None = None
    loss_last: float | None = None
    pushed: str | None = None  # the address on the hub that it was uploaded to, if that was asked for.
    # per token of held-out text, of the models ``dense``, ``pruned`` and ``recovered``, where asked for.
    perplexity: dict[str, float] | None = None


_RECORDED = ("tokens", "seconds", "layers", "trained_parameters", "passes", "loss_first", "loss_last")


def run(request: RecoverRequest, reporter: Reporter = Reporter()) -> RecoverResult | None:
    """Make the recovered checkpoint, or leave the one that was made from the same inputs.

    Checkpoints of lora and full lie in ``<output>.training`` until ``output`` is made, and the same request resumes
    from them.

    Returns:
        The result; None in all processes of torchrun but the first.

    Raises:
        KeyreduceError: there is no such model, the models do not belong together, the mode has no such setting, the
            text is empty or shares a document with the held-out text, ``output`` is there from other inputs or cannot
            be written, or numbers become NaN or inf.
    """
    from keyreduce.checkpoint.record import Record
    from keyreduce.data.text import FileText
    from keyreduce.devices import pick_device
    from keyreduce.outputs import claimed, is_already_made
    from keyreduce.recovery.overlap import refuse_overlap

    processes = Processes.of_torchrun()
    if processes.number > 1 and not request.trains:
        raise KeyreduceError(f"`mode` {request.mode} runs in one process: start keyreduce without torchrun")
    device, is_auto = pick_device(processes.device(request.device)), request.mode == modes.AUTO
    request = request.resolved(device.type)
    found = _find(request, device)
    heldout = FileText(request.heldout) if request.heldout else None
    if heldout is not None:
        refuse_overlap(found.text, heldout)
    target, inputs = found.target, found.inputs
    with claimed(target, folder=True, by_this_process=processes.rank == 0):
        if is_auto:
            reporter.note(modes.auto_note(request.mode))
        recorded = () if request.overwrite else Record.read(target).repairs
        made = not is_already_made(target, recorded[-1]["inputs"] if recorded else None, inputs, request.overwrite)
        if made and request.trains:
            _train(found, processes, reporter)
        elif made:
            _recover_layers(found, reporter)
        if processes.rank:
            return None
        entry = Record.read(target).repairs[-1]
    result = RecoverResult(
        recovered=target,
        made=made,
        mode=request.mode,
        pruned=found.pruned.path,
        dense=str(found.dense.path) if found.dense and not request.trains else found.dense_name,
        teacher=found.teacher and found.teacher.path,
        pushed=request.pushed(target),
        **{name: entry[name] for name in _RECORDED if name in entry},
    )
    if heldout is None:
        return result
    folders = {"dense": found.dense.path} if found.dense else {}
    folders |= {"pruned": result.pruned, "recovered": target}
    return replace(result, perplexity={name: _perplexity(one, heldout, found) for name, one in folders.items()})


class _Found(NamedTuple):
    """A request that was checked, and all that it needs.

    ``dense`` is None where it is not needed, and ``teacher`` where lora or full learn from the text alone; the name of
    the dense model is given where it is known.
    """

    request: RecoverRequest
    pruned: "Checkpoint"
    dense: "Checkpoint | None"
    teacher: "Checkpoint | None"
    dense_name: str | None
    text: "TextSource"
    settings: "Settings"
    how: Steps | Training | None
    repeats: float
    target: Path
    device: "torch.device"

    @property
    def inputs(self) -> dict:
        """What the result is made from; equal inputs give an equal result, up to rounding."""
        mode = self.request.mode
        shared = {"mode": mode, "algorithm": modes.ALGORITHMS[mode], "pruned": self.pruned.identity}
        shared |= {"text": {**self.text.describe(), "identity": self.text.identity}, **self.settings._asdict()}
        if isinstance(self.how, Training):
            teacher = self.teacher and self.teacher.identity
            return shared | {"teacher": teacher, "options": self.how.describe(mode, is_distilled=teacher is not None)}
        dense = self.dense and self.dense.identity
        return shared | {"dense": dense, "options": self.how._asdict() if self.how else {}, "repeats": self.repeats}

    def tell(self, reporter: Reporter, doing: str, how: str) -> None:
        """Report what begins."""
        reporter.note(f"{doing} {self.pruned.path.name} on {self.device} ({how}), {self.settings.tokens:,} tokens")

    def write(self, recovered: "Recovered", **more: Any) -> None:
        """Write the checkpoint; see :func:`keyreduce.recovery.writing.write_recovered`."""
        from keyreduce.recovery.writing import write_recovered

        more |= {"command": command_line(), "overwrite": self.request.overwrite}
        write_recovered(self.pruned, recovered, self.target, inputs=self.inputs, **more)


def _find(request: RecoverRequest, device: "torch.device") -> _Found:
    """Check a request whose mode is resolved, and find what it names, or what the record of the pruned model does."""
    from keyreduce.api.pair import find_dense
    from keyreduce.checkpoint.find import find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.record import Record
    from keyreduce.families import family_of
    from keyreduce.outputs import refuse_source
    from keyreduce.recovery.repeats import check_repeats

    given, trains, workspace = request.settings, request.trains, request.workspace
    repeats = REPEATS if trains else given.pop("repeats", REPEATS)
    how = (modes.make_training if trains else modes.make_steps)(request.mode, given)
    check_repeats(repeats)
    if request.compressed is None and not workspace.pruned.is_dir():
        raise KeyreduceError(
            f"there is no pruned model at {workspace.pruned}; run keyreduce prune, or name one with `compressed`"
        )
    compressed, target = request.compressed or str(workspace.pruned), request.output or workspace.recovered
    text = request.text_source("train" if trains else "calibration")
    pruned = open_folder(find_model(compressed))
    name = request.model if trains else request.model or request.teacher
    if not trains and request.teacher not in (None, name):
        raise KeyreduceError(f"`mode` {request.mode} takes one dense model: leave out `teacher` or `model`")
    dense, dense_name = None, name or Record.read(pruned.path).dense
    is_teacher = trains and request.teacher is None and request.distill_weight is not None
    if is_teacher or not trains or (request.heldout and dense_name):
        field = "teacher" if trains else "model"
        dense = open_folder(find_dense(name, pruned.path, compressed, unrelated=request.unrelated, field=field))
    teacher = dense if is_teacher else None
    if trains and request.teacher is not None:
        teacher = open_folder(find_model(request.teacher))
    sources = [Path(compressed)] if os.path.isdir(compressed) else []
    for source in (*sources, *(model.path for model in (pruned, dense, teacher) if model is not None)):
        refuse_source(target, source)
    settings = request.amount(device.type, family_of(pruned.config).width(pruned.config))
    return _Found(request, pruned, dense, teacher, dense_name, text, settings, how, repeats, target, device)


def _recover_layers(found: _Found, reporter: Reporter) -> None:
    """Make the checkpoint in a layer-wise mode."""
    from keyreduce.recovery.layers import recover_checkpoint

    dense, steps = found.dense, found.how
    assert dense is not None and not isinstance(steps, Training)
    found.tell(reporter, "recovering", found.request.mode)
    start = time.perf_counter()
    with reporter.progress("recovering", dense.config.get("num_hidden_layers"), "layers") as progress:
        where: dict[str, Any] = {"device": found.device, "progress": progress, "note": reporter.note}
        where |= {"steps": steps, "repeats": found.repeats}
        recovered = recover_checkpoint(dense, found.pruned, found.text, found.settings, **where)
    found.write(recovered, seconds=time.perf_counter() - start)


def _train(found: _Found, processes: Processes, reporter: Reporter) -> None:
    """Make the checkpoint in a mode that trains the whole model; every process of torchrun calls this."""
    from keyreduce.devices import device_name
    from keyreduce.drawing import joined, save_picture, text_words
    from keyreduce.outputs import claimed
    from keyreduce.recovery.layers import Recovered
    from keyreduce.recovery.training.picture import draw_losses
    from keyreduce.recovery.training.run import train

    request, teacher, settings, how = found.request, found.teacher, found.settings, found.how
    assert isinstance(how, Training)
    folder = found.target.with_name(f"{found.target.name}.training")
    with claimed(folder, folder=True, by_this_process=processes.rank == 0):
        told = f"{request.mode}, with teacher {teacher.path.name}" if teacher else request.mode
        found.tell(reporter, "training", told)
        reporter.keep(f"{folder}, if it has a checkpoint, from which the same command resumes")
        start = time.perf_counter()
        with reporter.progress("training", settings.tokens, "tokens") as progress:
            where: dict[str, Any] = {"device": found.device, "progress": progress, "note": reporter.note}
            where |= {"folder": folder, "inputs": found.inputs, "overwrite": request.overwrite}
            trained = train(found.pruned, teacher, found.text, settings, request.mode, how, **where)
        if trained is None:
            return
        seconds = time.perf_counter() - start
        figures = trained.figures(settings.batch_size * settings.seq_len)

        def finish(made: Path) -> None:
            tokens = [tokens for tokens, _ in figures["losses"]]
            title = f"{found.pruned.path.name}: recovery, {told}"
            about = joined(text_words(found.text.describe()), device_name(found.device))
            loss = "loss with a teacher" if teacher else "loss"
            figure = draw_losses(tokens, trained.losses, title=title, about=about, loss=loss)
            save_picture(figure, made / "training.png")
            if (folder / "runs").is_dir():
                shutil.copytree(folder / "runs", made / "runs")  # tensorboard's

        recovered = Recovered(trained.tensors, trained.tokens, {})
        found.write(recovered, seconds=seconds, figures=figures, finish=finish)
        shutil.rmtree(folder, ignore_errors=True)


def _perplexity(folder: Path, heldout: "TextSource", found: _Found) -> float:
    """Return the perplexity per token of a model on text that it was not recovered on."""
    import torch

    from keyreduce.evaluation.perplexity import text_costs, total
    from keyreduce.models.loading import load_model

    loaded = load_model(folder, found.device, torch.float32, gradients=True)
    return total(text_costs(loaded, heldout, seq_len=1024, batch_size=4, num_rows=None)).perplexity

"""A pruned model and text to the same model with some of its quality won back."""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from keyreduce.api import options
from keyreduce.api.request import Result, option
from keyreduce.errors import KeyreduceError
from keyreduce.processes import Processes, command_line
from keyreduce.recovery.modes import (
    ALGORITHMS,
    LEAST_SQUARES,
    MODES,
    RATES,
    REPEATS,
    SETTINGS,
    TRAINING_MODES,
    Kernels,
    Mode,
    Scope,
    Steps,
    Training,
    make_steps,
    make_training,
)
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    import torch

    from keyreduce.calibration.run import Settings
    from keyreduce.checkpoint.source import Checkpoint
    from keyreduce.data.text import TextSource
    from keyreduce.recovery.layers import Recovered

_MODE_HELP = "\n\n".join(f"{name}: {summary}" for name, summary in (MODES | TRAINING_MODES).items())
_OF_RECONSTRUCT = "Options of --mode reconstruct"
_OF_TRAINING = "Options of --mode lora and full"
_OF_LORA = "Options of --mode lora"
_DEFAULTS = Training(lr=0.0)._asdict() | Steps()._asdict()


def _setting(name: str, panel: str, *, help: str, shown_default: str | None = None, **settings: Any) -> Any:
    """Declare a setting of single modes, whose default :mod:`keyreduce.recovery.modes` has."""
    return option(None, help=help, panel=panel, shown_default=shown_default or f"{_DEFAULTS[name]:g}", **settings)


@dataclass(frozen=True, kw_only=True)
class RecoverRequest(options.OfRun, options.OfText, options.AfterPrune):
    """Win quality back after pruning. Sizes and config stay as pruned.

    least-squares and reconstruct go layer by layer, from the bottom up, in float32: each is fitted to what the dense
    model's layer gives, on the hidden states of the recovered layers below it. lora and full train the whole model:
    --num-batches steps of --batch-size rows, in one process or under torchrun.
    """

    mode: Mode = option(LEAST_SQUARES, help=_MODE_HELP)
    compressed: str | None = option(
        None,
        help="The pruned model to recover.",
        env="COMPRESSED_MODEL",
        metavar="PATH",
        shown_default="what prune wrote into --work",
    )
    model: str | None = option(
        None,
        help="The dense model.",
        env="BASE_MODEL_DIR",
        metavar="PATH|NAME",
        shown_default="what the pruned model was made from",
        instead_of=("teacher",),
    )
    teacher: str | None = option(
        None,
        help="The dense model; with --mode lora or full, any model of the same vocabulary to learn from.",
        metavar="PATH|NAME",
        shown_default="lora and full learn from the text alone",
    )
    unrelated: bool = option(False, help="Allow a dense model that the pruned one was not made from.")
    output: Path | None = options.output(help="The recovered checkpoint.")
    heldout: tuple[Path, ...] = option(
        (),
        help="Other text, to measure perplexity on before and after; refused where it shares a document with the text "
        "that the model is recovered on. May be repeated.",
        metavar="FILE|FOLDER",
        panel="Text",
        shown_default="not measured",
    )
    num_batches: int = options.num_batches(32)
    batch_size: int = options.batch_size(8)
    seq_len: int = options.seq_len(512)
    repeats: float | None = option(
        None,
        help="With least-squares and reconstruct, the share of the rows that are random tokens, repeated, in the place "
        "of text: they keep recall.",
        metavar="SHARE",
        shown_default=f"{REPEATS:g}",
    )
    steps: int | None = _setting("steps", _OF_RECONSTRUCT, help="Gradient steps in each layer.", minimum=1)
    lr: float | None = option(
        None,
        help="The highest learning rate, of gradient steps.",
        shown_default=", ".join(f"{mode} {rate:g}" for mode, rate in RATES.items()),
    )
    scope: Scope | None = _setting(
        "scope",
        _OF_RECONSTRUCT,
        help="Fit the mixer to what the dense block gives or to what the dense mixer gives, or mixer and MLP to what "
        "the dense block gives.",
        shown_default=_DEFAULTS["scope"],
    )
    distill_weight: float | None = _setting(
        "distill_weight",
        _OF_TRAINING,
        help="The share of the loss that compares the model with its teacher; the rest is the loss on the text. "
        "Without --teacher, the model that the pruned one was made from is the teacher.",
        shown_default=f"{_DEFAULTS['distill_weight']:g} with --teacher",
        minimum=0,
        maximum=1,
    )
    temperature: float | None = _setting(
        "temperature", _OF_TRAINING, help="What the logits of teacher and model are divided by, to compare them."
    )
    warmup: float | None = _setting("warmup", _OF_TRAINING, help="Share of the steps in which the learning rate rises.")
    micro_batch: int | None = _setting(
        "micro_batch",
        _OF_TRAINING,
        help="Rows that a device takes at a time; the gradients of a batch are added up.",
        shown_default="its share of --batch-size",
        minimum=1,
    )
    gradient_checkpointing: bool = option(
        False, help="Compute activations twice, to keep fewer of them.", panel=_OF_TRAINING
    )
    shard: bool = option(
        False,
        help="FSDP: distribute weights, gradients and optimizer state among torchrun's processes.",
        panel=_OF_TRAINING,
    )
    save_every: int | None = _setting(
        "save_every",
        _OF_TRAINING,
        help="Steps between checkpoints, from which the same command resumes after an interruption.",
        shown_default="a tenth of --num-batches",
        minimum=1,
    )
    kernels: Kernels | None = _setting(
        "kernels",
        _OF_TRAINING,
        help="keyreduce's PyTorch, which needs no tuning, or fla's own Triton kernels, on GPUs they train on.",
        shown_default=_DEFAULTS["kernels"],
    )
    lora_rank: int | None = _setting("lora_rank", _OF_LORA, help="Their rank.", minimum=1)
    lora_alpha: float | None = _setting("lora_alpha", _OF_LORA, help="Their scale times the rank.")
    lora_targets: tuple[str, ...] = option(
        (),
        help="Linear layers that get a low-rank addition, by the end of their names. May be repeated.",
        metavar="NAME",
        panel=_OF_LORA,
        shown_default="the projections of q, k and v",
    )
    push_to_hub: str | None = options.push_to_hub()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of single modes that were given: name -> value."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: value for name, value in values.items() if not (value is None or value is False or value == ())}


@dataclass(frozen=True, kw_only=True)
class RecoverResult(Result):
    """A recovered checkpoint.

    Attributes:
        recovered: its folder.
        made: whether this run made it; else it was there already, from the same inputs, and the figures are those of
            the run that made it.
        mode: the mode that made it.
        pruned: the folder of the pruned model.
        dense: the dense model; None where it is not known, nor needed by the mode.
        teacher: the folder of the model that lora or full learned from, if there was one.
        tokens: the number of tokens that were used.
        seconds: how long it took.
        layers: layer -> figures: ``ridge``, the strength of the regression; ``missing_before`` and ``missing_after``,
            the share of the squares of the dense mixer's output that is missing before and after it; with reconstruct
            also ``missing_reconstructed``, the same after the gradient steps, and ``error_first`` and ``error_last``,
            the relative error of what they fit, averaged over their first and last sixteenth. None for lora and full.
        trained_parameters: how many parameters lora or full trained.
        passes: the number of passes through the text that it began.
        loss_first, loss_last: its loss, averaged over the first and the last twentieth of the log, nats per token.
        pushed: the address on the hub that it was uploaded to, if that was asked for.
        perplexity: per token of held-out text, of the models ``dense``, ``pruned`` and ``recovered``, where asked for.
    """

    recovered: Path
    made: bool
    mode: str
    pruned: Path
    dense: str | None
    teacher: Path | None = None
    tokens: int
    seconds: float
    layers: dict[str, dict[str, float]] | None = None
    trained_parameters: int | None = None
    passes: int | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    pushed: str | None = None
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
    from keyreduce.checkpoint.hub import push_to_hub
    from keyreduce.checkpoint.record import Record
    from keyreduce.data.text import FileText
    from keyreduce.outputs import claimed, is_already_made
    from keyreduce.recovery.overlap import refuse_overlap

    processes = Processes.of_torchrun()
    if processes.number > 1 and request.mode in MODES:
        raise KeyreduceError(f"`mode` {request.mode} runs in one process: start keyreduce without torchrun")
    recovery = _Recovery.of(request, processes, reporter)
    heldout = FileText(request.heldout) if request.heldout else None
    if heldout is not None:
        refuse_overlap(recovery.text, heldout)
    target, models, inputs = recovery.target, recovery.models, recovery.inputs
    with claimed(target, folder=True, by_this_process=processes.rank == 0):
        recorded = () if request.overwrite else Record.read(target).repairs
        made = not is_already_made(target, recorded[-1]["inputs"] if recorded else None, inputs, request.overwrite)
        if made and request.mode in MODES:
            recovery.recover_layers()
        elif made:
            recovery.train(processes)
        if processes.rank:
            return None
        entry = Record.read(target).repairs[-1]
    result = RecoverResult(
        recovered=target,
        made=made,
        mode=request.mode,
        pruned=models.pruned.path,
        dense=str(models.dense.path) if models.dense and request.mode in MODES else models.dense_name,
        teacher=models.teacher and models.teacher.path,
        pushed=request.push_to_hub and push_to_hub(target, request.push_to_hub),
        **{name: entry[name] for name in _RECORDED if name in entry},
    )
    if heldout is None:
        return result
    folders = {"pruned": result.pruned, "recovered": target}
    folders = folders if models.dense is None else {"dense": models.dense.path, **folders}
    return replace(result, perplexity=_perplexities(folders, heldout, recovery.device))


class _Models(NamedTuple):
    """The models of a recovery.

    Attributes:
        pruned: the pruned model.
        dense: the dense model; None where it is not needed.
        teacher: what lora or full learns from; None where that is the text alone.
        dense_name: what the dense model is called, where that is known.
    """

    pruned: "Checkpoint"
    dense: "Checkpoint | None"
    teacher: "Checkpoint | None"
    dense_name: str | None

    @classmethod
    def of(cls, request: RecoverRequest, compressed: str) -> "_Models":
        """Find the models that a request names, or the record of the pruned one."""
        from keyreduce.api.pair import find_dense
        from keyreduce.checkpoint.find import find_model
        from keyreduce.checkpoint.folder import open_folder
        from keyreduce.checkpoint.record import Record

        trains = request.mode in TRAINING_MODES
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
        return cls(pruned, dense, teacher, dense_name)


@dataclass(frozen=True)
class _Recovery:
    """A request that was checked, and all that it needs."""

    request: RecoverRequest
    models: _Models
    text: "TextSource"
    settings: "Settings"
    how: Steps | Training | None
    repeats: float
    target: Path
    device: "torch.device"
    reporter: Reporter

    @classmethod
    def of(cls, request: RecoverRequest, processes: Processes, reporter: Reporter) -> "_Recovery":
        """Check a request, and find what it names."""
        from keyreduce.calibration.run import Settings
        from keyreduce.devices import pick_device
        from keyreduce.outputs import refuse_source
        from keyreduce.recovery.repeats import check_repeats

        given, trains = request.settings, request.mode in TRAINING_MODES
        repeats = REPEATS if trains else given.pop("repeats", REPEATS)
        how = make_training(request.mode, given) if trains else make_steps(request.mode, given)
        check_repeats(repeats)
        device = pick_device(processes.device(request.device))
        workspace = request.workspace
        if request.compressed is None and not workspace.pruned.is_dir():
            raise KeyreduceError(
                f"there is no pruned model at {workspace.pruned}; run keyreduce prune, or name one with `compressed`"
            )
        compressed, target = request.compressed or str(workspace.pruned), request.output or workspace.recovered
        default = "train" if trains else "calibration"
        text = request.text_source(default)
        models = _Models.of(request, compressed)
        sources = [Path(compressed)] if os.path.isdir(compressed) else []
        for source in (*sources, *(model.path for model in models[:3] if model is not None)):
            refuse_source(target, source)
        settings = Settings(request.num_batches, request.batch_size, request.seq_len, request.seed)
        return cls(request, models, text, settings, how, repeats, target, device, reporter)

    @property
    def inputs(self) -> dict:
        """What the result is made from; equal inputs give an equal result, up to rounding."""
        mode, models = self.request.mode, self.models
        shared = {"mode": mode, "algorithm": ALGORITHMS[mode], "pruned": models.pruned.identity}
        shared |= {"text": {**self.text.describe(), "identity": self.text.identity}, **self.settings._asdict()}
        if isinstance(self.how, Training):
            teacher = models.teacher and models.teacher.identity
            return shared | {"teacher": teacher, "options": self.how.describe(mode, is_distilled=teacher is not None)}
        dense = models.dense and models.dense.identity
        return shared | {"dense": dense, "options": self.how._asdict() if self.how else {}, "repeats": self.repeats}

    def recover_layers(self) -> None:
        """Make the checkpoint in a layer-wise mode."""
        from keyreduce.recovery.layers import recover_checkpoint

        dense, pruned = self.models.dense, self.models.pruned
        assert dense is not None and not isinstance(self.how, Training)
        self._say("recovering", self.request.mode)
        start = time.perf_counter()
        with self.reporter.progress("recovering", dense.config.get("num_hidden_layers"), "layers") as progress:
            recovered = recover_checkpoint(
                dense,
                pruned,
                self.text,
                self.settings,
                steps=self.how,
                device=self.device,
                repeats=self.repeats,
                progress=progress,
                note=self.reporter.note,
            )
        self._write(recovered, time.perf_counter() - start)

    def train(self, processes: Processes) -> None:
        """Make the checkpoint in a mode that trains the whole model; every process of torchrun calls this."""
        from keyreduce.outputs import claimed
        from keyreduce.recovery.layers import Recovered
        from keyreduce.recovery.training.picture import draw_losses
        from keyreduce.recovery.training.run import train

        assert isinstance(self.how, Training)
        teacher, folder = self.models.teacher, self.target.with_name(f"{self.target.name}.training")
        how = f"{self.request.mode}, with teacher {teacher.path.name}" if teacher else self.request.mode
        with claimed(folder, folder=True, by_this_process=processes.rank == 0):
            self._say("training", how)
            start = time.perf_counter()
            with self.reporter.progress("training", self.settings.tokens, "tokens") as progress:
                trained = train(
                    self.models.pruned,
                    teacher,
                    self.text,
                    self.settings,
                    self.request.mode,
                    self.how,
                    device=self.device,
                    folder=folder,
                    inputs=self.inputs,
                    overwrite=self.request.overwrite,
                    progress=progress,
                    note=self.reporter.note,
                )
            if trained is None:
                return
            seconds = time.perf_counter() - start
            figures = trained.figures(self.settings.batch_size * self.settings.seq_len)

            def finish(made: Path) -> None:
                label = "loss with a teacher" if teacher else "loss"
                draw_losses([tokens for tokens, _ in figures["losses"]], trained.losses, label, made / "training.png")
                if (folder / "runs").is_dir():
                    shutil.copytree(folder / "runs", made / "runs")  # tensorboard's

            self._write(Recovered(trained.tensors, trained.tokens, {}), seconds, figures, finish)
            shutil.rmtree(folder, ignore_errors=True)

    def _say(self, doing: str, how: str) -> None:
        name, tokens = self.models.pruned.path.name, self.settings.tokens
        self.reporter.note(f"{doing} {name} on {self.device} ({how}), {tokens:,} tokens")

    def _write(
        self,
        recovered: "Recovered",
        seconds: float,
        figures: Mapping | None = None,
        finish: Callable[[Path], None] | None = None,
    ) -> None:
        from keyreduce.recovery.writing import write_recovered

        write_recovered(
            self.models.pruned,
            recovered,
            self.target,
            inputs=self.inputs,
            seconds=seconds,
            command=command_line(),
            overwrite=self.request.overwrite,
            figures=figures,
            finish=finish,
        )


def _perplexities(folders: Mapping[str, Path], heldout: "TextSource", device: "torch.device") -> dict[str, float]:
    """Return the perplexity per token of each model on text that it was not recovered on."""
    import torch

    from keyreduce.evaluation.perplexity import text_costs, total
    from keyreduce.models.loading import load_model

    found = {}
    for label, folder in folders.items():
        loaded = load_model(folder, device, torch.float32, gradients=True)
        rows = text_costs(loaded, heldout, seq_len=1024, batch_size=4, num_rows=None)
        found[label] = total(rows).perplexity
    return found

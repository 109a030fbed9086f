"""Models side by side, in time and memory."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyreduce.api import options
from keyreduce.api.request import Result, option
from keyreduce.errors import KeyreduceError
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    import torch

    from keyreduce.benchmarking.timed_models import TimedModel

_KINDS = "What to time"
_PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class BenchmarkRequest(options.OfRun, options.OfPair):
    """Time the dense and the pruned model side by side, on the same input.

    One mixer layer stands for all: where a model's layers differ in size, it is the first.
    """

    mixer: bool = option(False, help="One mixer layer: the default.", panel=_KINDS)
    forward: bool = option(False, help="The whole model, reading a prompt.", panel=_KINDS)
    decode: bool = option(False, help="One token at a time, through the cache.", panel=_KINDS)
    train_step: bool = option(False, help="Forward, backward and optimizer.", panel=_KINDS)
    scaling: tuple[int, ...] = option(
        (),
        help="Random models of these key sizes instead, of the model's config.",
        metavar="K,K,...",
        commas=True,
        minimum=1,
        maximum=options.MOST,
    )
    config: Path | None = option(None, help="For --scaling: a config.json, or a folder that holds it.", metavar="PATH")
    batch_size: int = options.batch_size(4, help="Sequences in the input, but for --decode.")
    seq_len: tuple[int, ...] = option(
        (1024,),
        help="Tokens in a sequence, but for --decode.",
        metavar="T,T,...",
        commas=True,
        minimum=1,
        maximum=options.MOST,
    )
    decode_batch_sizes: tuple[int, ...] = option(
        (),
        help="For --decode: sequences at once.",
        metavar="B,B,...",
        commas=True,
        minimum=1,
        maximum=options.MOST,
        shown_default="1,32,256 on a GPU, 1,8 on a CPU",
    )
    scopes: tuple[Literal["model", "mixer", "operator"], ...] = option(
        ("model", "mixer", "operator"), help="For --decode: what to time.", metavar="model,mixer,operator", commas=True
    )
    max_batch_size: int | None = option(
        None,
        help="For --decode: where the search for the largest batch that fits ends; 0: no search.",
        minimum=0,
        maximum=options.MOST,
        shown_default="65536 on a GPU, 32 on a CPU",
    )
    rounds: int = option(30, help="Timed calls of each model, taken in turns.", minimum=1, maximum=options.MOST)
    output: Path | None = options.output(help="The figures as JSON.", metavar="FILE")
    plot: Path | None = option(None, help="Also draw the figures, into a .png file.", metavar="FILE")
    dtype: options.Dtype | None = options.dtype()

    @property
    def kinds(self) -> list[str]:
        """The kinds of measurement that were chosen; one mixer layer, where none was."""
        chosen = {name: getattr(self, name) for name in ("mixer", "forward", "decode", "train_step")}
        return [name for name, is_chosen in chosen.items() if is_chosen] or ["mixer"]


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """A benchmark.

    Attributes:
        report: see :func:`keyreduce.benchmarking.report.benchmark_report`.
        output: the file that holds it.
    """

    report: dict
    output: Path

    def to_json(self) -> dict:
        """Return the report."""
        return self.report


def run(request: BenchmarkRequest, reporter: Reporter = Reporter()) -> BenchmarkResult:
    """Time the models, write the report, and draw it where that is asked for.

    Raises:
        KeyreduceError: a model does not load, the models cannot be compared, there is not enough memory, fla's kernels
            do not run what is asked for, or a file cannot be written.
    """
    from keyreduce.benchmarking.report import benchmark_report, total_rounds
    from keyreduce.benchmarking.timed_models import explained_out_of_memory
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.outputs import appearing, claimed, refuse_existing, write_json

    _check(request)
    for path in (request.output, request.plot):
        refuse_existing(path, request.overwrite)
    output = request.output or request.workspace.benchmark
    device = pick_device(request.device)
    dtype = pick_dtype(request.dtype, device)
    on_gpu, kinds = device.type == "cuda", request.kinds
    if on_gpu and dtype.itemsize > 2 and kinds != ["decode"]:
        raise KeyreduceError("fla's kernels for whole sequences refuse float32 on a GPU; set `dtype` to bfloat16")
    batch_sizes = request.decode_batch_sizes or ((1, 32, 256) if on_gpu else (1, 8))
    most = request.max_batch_size if request.max_batch_size is not None else 65536 if on_gpu else 32
    rounds: dict[str, Any] = {"kinds": kinds, "seq_lens": request.seq_len, "decode_batch_sizes": batch_sizes}
    rounds |= {"scopes": request.scopes, "rounds": request.rounds}
    with contextlib.ExitStack() as claims:
        for path in {output, request.plot or output}:
            claims.enter_context(claimed(path, folder=False))
        with explained_out_of_memory("loading the models"):
            models = _models(request, device, dtype, reporter)
        with reporter.progress("timing", total_rounds(device=device, **rounds), "rounds") as progress:
            inputs: dict[str, Any] = {**rounds, "batch_size": request.batch_size, "seed": request.seed}
            inputs["max_batch_size"] = most
            report = benchmark_report(models, **inputs, progress=progress)
        write_json(output, report, overwrite=True)
        if request.plot is not None:
            from keyreduce.benchmarking.plot import plot_report

            with appearing(request.plot, folder=False, overwrite=True) as temporary:
                plot_report(report, temporary)
    return BenchmarkResult(report=report, output=output)


def _check(request: BenchmarkRequest) -> None:
    if request.config is not None and not request.scaling:
        raise KeyreduceError("`config` is for `scaling`, which makes random models of it; name the key sizes")
    if not request.seq_len:
        raise KeyreduceError("`seq_len` names no length; give at least one")
    if request.plot is not None and request.plot.suffix not in _PLOT_SUFFIXES:
        raise KeyreduceError(f"`plot` is {request.plot}; its name ends in .png, .svg or .pdf")


def _models(
    request: BenchmarkRequest, device: "torch.device", dtype: "torch.dtype", reporter: Reporter
) -> "list[TimedModel]":
    from keyreduce.api.pair import load_pair
    from keyreduce.benchmarking.timed_models import random_models, timed_models

    if not request.scaling:
        return timed_models(load_pair(request, reporter, device, dtype, with_tokenizer=False))
    whole = request.kinds != ["mixer"]
    return random_models(_config(request), request.scaling, device, dtype, whole=whole, seed=request.seed)


def _config(request: BenchmarkRequest) -> dict:
    """Return the config that random models are made from: the one named, else the model's own."""
    from keyreduce.checkpoint.find import find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.outputs import read_json

    path = request.config
    if path is None:
        return open_folder(find_model(request.model)).config
    return read_json(path / "config.json" if path.is_dir() else path)

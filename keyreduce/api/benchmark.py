"""Models side by side, in time and memory."""

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keyreduce.api import options
from keyreduce.api.request import Report, option
from keyreduce.errors import KeyreduceError
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    import torch

    from keyreduce.benchmarking.timed_models import TimedModel

_KIND = {"panel": "What to measure"}
_SIZE = re.compile("([1-9][0-9]{0,8})(?:x([1-9][0-9]{0,8}))?")


@dataclass(frozen=True, kw_only=True)
class BenchmarkRequest(options.OfRun, options.OfPair):
    """Time the dense and the pruned model side by side, on the same input.

    One mixer layer stands for all: where a model's layers differ in size, it is the first.
    """

    mixer: bool = option(False, "One mixer layer: the default.", **_KIND)
    forward: bool = option(False, "The whole model, reading a prompt.", **_KIND)
    decode: bool = option(False, "One token at a time, through the cache.", **_KIND)
    train_step: bool = option(False, "Forward, backward and optimizer.", **_KIND)
    scaling: tuple[str, ...] = option(
        (),
        "Random models of the model's config instead, whose heads have K key channels, or K key and V value channels; "
        "with --mixer also its time per token.",
        metavar="K|KxV,...",
        commas=True,
        **_KIND,
    )
    config: Path | None = option(None, "For --scaling: a config.json, or its folder.", metavar="PATH", panel="Model")
    batch_size: int = options.batch_size(4, "Sequences in the input; --decode has --decode-batch-sizes.")
    seq_len: tuple[int, ...] = option(
        (1024,), "Tokens in a sequence, but for --decode.", metavar="T,...", **options.COUNTS, **options.TEXT
    )
    decode_batch_sizes: tuple[int, ...] = option(
        (),
        "For --decode: sequences at once.",
        metavar="B,...",
        shown_default="on a GPU 1,32,256, else 1,8",
        **options.COUNTS,
    )
    scopes: tuple[Literal["model", "mixer", "operator"], ...] = option(
        ("model", "mixer", "operator"), "For --decode: what to time.", metavar="NAME,...", commas=True
    )
    max_batch_size: int | None = option(
        None,
        "For --decode: where the search for the largest batch that fits ends; 0: no search.",
        shown_default="65536 on a GPU, 32 on a CPU",
        **options.COUNT | {"minimum": 0},
    )
    rounds: int = option(30, "Timed calls of each model, taken in turns.", **options.COUNT)
    output: Path | None = options.output("The figures as JSON.", metavar="FILE")
    plot: Path | None = option(None, "Also draw the figures, into a .png file.", metavar="FILE", **options.OUTPUT)
    dtype: options.Dtype | None = options.dtype()

    @property
    def kinds(self) -> list[str]:
        """The kinds of measurement that were chosen; one mixer layer, where none was."""
        chosen = {name: getattr(self, name) for name in ("mixer", "forward", "decode", "train_step")}
        return [name for name, is_chosen in chosen.items() if is_chosen] or ["mixer"]


def run(request: BenchmarkRequest, reporter: Reporter = Reporter()) -> Report:
    """Time the models, write the report, and draw it where that is asked for.

    Returns:
        What :func:`keyreduce.benchmarking.report.benchmark_report` does.

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
    if request.scaling and "mixer" in kinds:
        kinds = [*kinds, "per_token"]
    rounds: dict[str, Any] = {"kinds": kinds, "seq_lens": request.seq_len, "decode_batch_sizes": batch_sizes}
    rounds |= {"scopes": request.scopes, "rounds": request.rounds}
    amounts: dict[str, Any] = {"batch_size": request.batch_size, "seed": request.seed, "max_batch_size": most}
    with contextlib.ExitStack() as claims:
        for path in {output, request.plot or output}:
            claims.enter_context(claimed(path, folder=False))
        with explained_out_of_memory("loading the models"):
            models = _models(request, device, dtype, reporter)
        with reporter.progress("timing", total_rounds(device=device, **rounds), "rounds") as progress:
            report = benchmark_report(models, **rounds, **amounts, progress=progress)
        write_json(output, report, overwrite=True)
        if request.plot is not None:
            from keyreduce.benchmarking.plot import plot_report

            with appearing(request.plot, folder=False, overwrite=True) as temporary:
                plot_report(report, temporary)
    return Report(content=report, output=output)


def _check(request: BenchmarkRequest) -> None:
    if request.config is not None and not request.scaling:
        raise KeyreduceError("`config` is for `scaling`, which makes random models of it; name their sizes")
    _head_sizes(request.scaling)
    if not request.seq_len:
        raise KeyreduceError("`seq_len` names no length; give at least one")
    if request.plot is not None and request.plot.suffix not in (".png", ".svg", ".pdf"):
        raise KeyreduceError(f"`plot` is {request.plot}; its name ends in .png, .svg or .pdf")


def _head_sizes(scaling: tuple[str, ...]) -> list[tuple[int, int | None]]:
    """Return the key and the value channels of a head for each size; None stands for those of the config."""
    pairs = []
    for size in scaling:
        match = _SIZE.fullmatch(size)
        if match is None:
            raise KeyreduceError(
                f"`scaling` has {size!r}; a size is K or KxV, in whole numbers from 1, such as 96 or 96x104"
            )
        pairs.append((int(match[1]), int(match[2]) if match[2] else None))
    return pairs


def _models(
    request: BenchmarkRequest, device: "torch.device", dtype: "torch.dtype", reporter: Reporter
) -> "list[TimedModel]":
    from keyreduce.api.pair import load_pair
    from keyreduce.benchmarking.timed_models import random_models, sizes_named, timed_models
    from keyreduce.checkpoint.find import find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.outputs import read_json

    if not request.scaling:
        return timed_models(load_pair(request, reporter, device, dtype, with_tokenizer=False))
    path, whole = request.config, request.kinds != ["mixer"]
    if path is None:
        config = open_folder(find_model(request.model)).config
    else:
        config = read_json(path / "config.json" if path.is_dir() else path)
    sizes = sizes_named(config, _head_sizes(request.scaling))
    for size in sizes:
        if sizes.count(size) > 1:
            raise KeyreduceError(f"`scaling` names {size.head_k_dim}x{size.head_v_dim} twice; give different sizes")
    return random_models(config, sizes, device, dtype, whole=whole, seed=request.seed)

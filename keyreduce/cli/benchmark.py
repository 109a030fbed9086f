"""``keyreduce benchmark``: dense against pruned, or one key size against another, in time and memory."""

from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in str(text).split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number, or several with commas between") from None
    if min(numbers) < 1:
        raise typer.BadParameter(f"{text!r}: each number is at least 1")
    return numbers


_KINDS = "What to time"


def benchmark(
    model: options.DenseModel = None,
    compressed: options.Compressed = None,
    work: options.Work = options.DEFAULT_WORK,
    mixer: Annotated[
        bool, typer.Option("--mixer", rich_help_panel=_KINDS, help="One mixer layer: the default.")
    ] = False,
    forward: Annotated[
        bool, typer.Option("--forward", rich_help_panel=_KINDS, help="The whole model, reading a prompt.")
    ] = False,
    decode: Annotated[
        bool, typer.Option("--decode", rich_help_panel=_KINDS, help="One token at a time, through the cache.")
    ] = False,
    train_step: Annotated[
        bool, typer.Option("--train-step", rich_help_panel=_KINDS, help="Forward, backward and optimizer.")
    ] = False,
    scaling: Annotated[
        str | None,
        typer.Option(
            parser=_numbers, metavar="K,K,...", help="Random models of these key sizes instead, of the model's config."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="PATH", help="For --scaling: a config.json, or a folder that holds it.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in the input, but for --decode.")] = 4,
    seq_len: Annotated[
        str, typer.Option(parser=_numbers, metavar="T,T,...", help="Tokens in a sequence, but for --decode.")
    ] = "1024",
    decode_batch_sizes: Annotated[
        str | None,
        typer.Option(
            parser=_numbers,
            metavar="B,B,...",
            help="For --decode: sequences at once.",
            show_default="1,32,256 on a GPU, 1,8 on a CPU",
        ),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="For --decode: where the search for the largest batch that fits ends; 0: no search.",
            show_default="65536 on a GPU, 32 on a CPU",
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each model, taken in turns.")] = 30,
    output: options.Figures = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw the figures, into a .png file.")] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time the dense and the pruned model side by side, on the same input.

    One mixer layer stands for all: where a model's layers differ in size, it is the first.
    """
    from keyreduce.api.pair import load_pair
    from keyreduce.benchmarking.report import Request, benchmark_report, total_rounds
    from keyreduce.benchmarking.subjects import memory_errors_told, random_subjects, subjects_of
    from keyreduce.cli.benchmark_tables import print_tables
    from keyreduce.cli.console import Console
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.errors import KeyreduceError
    from keyreduce.outputs import refuse_existing, refuse_unwritable, write_json
    from keyreduce.workspace import Workspace

    console, workspace = Console(as_json=json), Workspace(work)
    if config is not None and scaling is None:
        raise KeyreduceError("--config is for --scaling, which makes random models of it; name the key sizes")
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise KeyreduceError(f"--plot {plot}: its name ends in .png, .svg or .pdf")
    for path in (output, plot):
        refuse_existing(path, overwrite)
    refuse_unwritable(output or workspace.benchmark, folder=False)
    if plot is not None:
        refuse_unwritable(plot, folder=False)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    asked = {"mixer": mixer, "forward": forward, "decode": decode, "train_step": train_step}
    kinds = [kind for kind, wanted in asked.items() if wanted] or ["mixer"]
    on_gpu = device.type == "cuda"
    if on_gpu and dtype.itemsize > 2 and kinds != ["decode"]:
        raise KeyreduceError("fla's kernels for whole sequences refuse float32 on a GPU; take --dtype bfloat16")
    if max_batch_size is None:
        max_batch_size = 65536 if on_gpu else 32
    request = Request(
        kinds=kinds,
        batch_size=batch_size,
        seq_lens=seq_len,
        decode_batch_sizes=decode_batch_sizes or ([1, 32, 256] if on_gpu else [1, 8]),
        max_batch_size=max_batch_size,
        rounds=rounds,
        seed=seed,
    )
    with memory_errors_told("loading the models"):
        if scaling is None:
            pair = load_pair(console, model, compressed, workspace, device, dtype, with_tokenizer=False, unrelated=False)
            subjects = subjects_of(pair)
        else:
            content, whole = _config(config, model), kinds != ["mixer"]
            subjects = random_subjects(content, scaling, device, dtype, whole=whole, seed=seed)
    with console.progress("timing", total_rounds(request, device), "rounds") as progress:
        report = benchmark_report(subjects, request, progress)
    write_json(output or workspace.benchmark, report, overwrite=True)
    for entry in report["models"]:
        if not entry["layers_alike"]:
            console.say(
                f"{entry['label']}: its layers differ in size; where one layer is timed, that is layer {entry['layer']}"
            )
    print_tables(console, report)
    console.say(f"wrote {output or workspace.benchmark}")
    if plot is not None:
        from keyreduce.benchmarking.plot import plot_report

        plot_report(report, plot)
        console.say(f"wrote {plot}")
    console.result(report)


def _config(path: Path | None, model: str | None) -> dict:
    """Return the config that random models are made of: the one named, else the model's own."""
    from keyreduce.checkpoint.find import find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.outputs import read_json

    if path is None:
        return open_folder(find_model(model)).config
    return read_json(path / "config.json" if path.is_dir() else path)

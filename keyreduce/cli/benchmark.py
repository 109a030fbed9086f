"""``keyreduce benchmark``: dense against pruned, in time and memory."""

from typing import Annotated

import typer

from keyreduce.cli import options


def benchmark(
    model: options.DenseModel = None,
    compressed: options.Compressed = None,
    work: options.Work = options.DEFAULT_WORK,
    mixer: Annotated[bool, typer.Option("--mixer", help="Time one mixer layer: the default, all there is.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in the input.")] = 4,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 1024,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each model, taken in turns.")] = 30,
    output: options.Figures = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Time the mixer layer of the dense and of the pruned model side by side, on the same input."""
    from keyreduce.benchmarking.mixer import benchmark_mixers
    from keyreduce.cli.console import Console
    from keyreduce.cli.pair import load_pair
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.workspace import Workspace, refuse_existing, refuse_unwritable, write_json

    console, workspace = Console(as_json=json), Workspace(work)
    refuse_existing(output, overwrite)
    refuse_unwritable(output or workspace.benchmark, folder=False)
    device = pick_device(device)
    models = load_pair(console, model, compressed, workspace, device, pick_dtype(dtype, device))
    with console.progress("timing", rounds, "rounds") as progress:
        report = benchmark_mixers(
            models, batch_size=batch_size, seq_len=seq_len, rounds=rounds, seed=seed, progress=progress
        )
    write_json(output or workspace.benchmark, report, overwrite=True)
    _print(console, report)
    console.say(f"wrote {output or workspace.benchmark}")
    console.result(report)


def _print(console, report: dict) -> None:
    from keyreduce.cli.console import mebibytes, scaled

    def spread(value: dict, factor: float = 1) -> str:
        low, median, high = (f"{factor * value[name]:.3g}" for name in ("low", "median", "high"))
        return f"{median} ({low}–{high})"

    def times(ratio: float) -> str:
        return f"{ratio:.2f}x"

    dense, *pruned = report["models"]
    header, columns = [""], []
    rows = ["head_k_dim", "tokens/s", "latency, ms", "peak memory", "state per sequence"]
    for entry in report["models"]:
        header.append(entry["label"])
        columns.append(
            [
                str(entry["head_k_dim"]),
                scaled(entry["tokens_per_second"]),
                spread(entry["latency_seconds"], 1e3),
                mebibytes(entry["peak_memory_bytes"]),
                mebibytes(entry["state_bytes_per_sequence"]),
            ]
        )
    for entry in pruned:
        header.append("dense / pruned")
        keys = times(dense["head_k_dim"] / entry["head_k_dim"])
        speed = spread(entry["speedup"])
        columns.append([keys, "", speed, times(entry["memory_ratio"]), times(entry["state_ratio"])])
    settings = report["settings"]
    console.say(
        f"one mixer layer, {settings['batch_size']} x {settings['seq_len']} tokens, {settings['dtype']}, "
        f"{settings['device']}; {settings['rounds']} rounds in turns, median (95% interval)"
    )
    console.table("", header, [(name, *cells) for name, *cells in zip(rows, *columns, strict=True)])

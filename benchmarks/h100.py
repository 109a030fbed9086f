"""How fast pruned key sizes are on a GPU: DeltaNet and Gated DeltaNet of hidden 2048, 16 heads, 128 value channels.

    python benchmarks/h100.py [--output benchmarks/h100] [--only decode-32 ...]
    python benchmarks/h100.py --compile-only    # beside other work, on another GPU; then --compiled
    python benchmarks/h100.py --table

Each measurement is a file of its own below the output folder, and one that is there is not made again, so a run that
was cut off goes on where it was. At the end, and with ``--table``, each architecture's files are put together into one
JSON file and one picture, and the tables are printed as Markdown. Kernels are compiled by one process for each key size
before anything is timed; which of their variants is best, the measuring process finds out by itself, and gives each
20 ms (Triton's own 100 would add up to minutes in a step of training).
"""

import argparse
import gc
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import triton.testing

from keyreduce.api import benchmark
from keyreduce.api.benchmark import BenchmarkRequest
from keyreduce.benchmarking.plot import plot_report
from keyreduce.cli.console import scaled
from keyreduce.errors import KeyreduceError, reason
from keyreduce.outputs import read_json, write_json

HERE = Path(__file__).parent
CONFIGS = {name: HERE.parent / f"configs/benchmark/{name}-2048.json" for name in ("delta-net", "gated-deltanet")}
KEY_SIZES = (128, 96, 64, 48, 32)

# Whole sequences come in batches of 32,768 tokens.
SHAPES = {length: {"batch_size": 32768 // length, "seq_len": [length]} for length in (2048, 8192)}
MEASUREMENTS = {
    **{f"mixer-{length}": BenchmarkRequest(mixer=True, **shape) for length, shape in SHAPES.items()},
    **{
        f"decode-{size}": BenchmarkRequest(decode=True, decode_batch_sizes=[size], max_batch_size=0)
        for size in (1, 32, 256)
    },
    **{f"forward-{length}": BenchmarkRequest(forward=True, **shape) for length, shape in SHAPES.items()},
    # The first batch says how much memory one takes, and should be large enough that little else counts.
    "largest-batch": BenchmarkRequest(decode=True, decode_batch_sizes=[1024], max_batch_size=1 << 20, scopes=()),
    "train_step-2048": BenchmarkRequest(train_step=True, batch_size=4, seq_len=[2048], rounds=15),
}


def main() -> None:
    """Measure what is missing and put all together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "h100", help="the folder of the results")
    parser.add_argument("--only", nargs="*", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="NAME")
    parser.add_argument("--config", nargs="*", choices=CONFIGS, default=list(CONFIGS), metavar="NAME")
    parser.add_argument("--key-sizes", nargs="*", type=int, default=KEY_SIZES, metavar="K")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--compile-only", action="store_true", help="compile, and leave the rest to --compiled")
    parser.add_argument("--compiled", action="store_true", help="Triton's cache has the kernels")
    parser.add_argument("--compile-here", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.compile_here:
        compile_here(chosen)
        return
    if chosen.compile_only:
        compile_kernels(missing(chosen.only, chosen), chosen)
        return
    failed = []
    if not chosen.table:
        triton.testing.do_bench = partial(triton.testing.do_bench, warmup=5, rep=20)
        # The kernels of training take minutes more to compile and to tune: all else is measured before.
        training = [name for name in chosen.only if MEASUREMENTS[name].train_step]
        stages = ([name for name in MEASUREMENTS if name in set(chosen.only) - set(training)], training)
        failed = [told for stage in stages for told in measure(stage, chosen)]
    put_together(chosen.output)
    if failed:
        sys.exit("\n".join(["not measured:", *failed]))


def missing(names: Sequence[str], chosen: argparse.Namespace) -> dict[str, list[str]]:
    """Return for each architecture those of some measurements that are not there yet, where there are any."""
    todo = {
        config: [name for name in names if not file_of(chosen.output, config, name).exists()]
        for config in chosen.config
    }
    return {config: found for config, found in todo.items() if found}


def measure(names: Sequence[str], chosen: argparse.Namespace) -> list[str]:
    """Make those of some measurements that are not there yet, for each architecture; return which failed, and why.

    Where Triton is known to get fla's gradients wrong, training is refused (``keyreduce/models/miscompiled.py``).
    """
    failed = []
    todo = missing(names, chosen)
    if todo and not chosen.compiled and torch.device(chosen.device).type == "cuda":
        compile_kernels(todo, chosen)
    start = time.perf_counter()
    for config, found in todo.items():
        for name in found:
            gc.collect()  # the models of the last measurement
            try:
                benchmark.run(request_of(config, name, chosen, file_of(chosen.output, config, name)))
            except (KeyreduceError, RuntimeError) as error:
                failed.append(f"{config} {name}: {reason(error)}")
                tell(f"== {failed[-1]}")
            else:
                tell(f"== {config} {name}, {time.perf_counter() - start:.0f} s after the first")
    return failed


def request_of(config: str, name: str, chosen: argparse.Namespace, output: Path) -> BenchmarkRequest:
    """Return a measurement of random models of an architecture, one for each key size."""
    models = {"scaling": chosen.key_sizes, "config": CONFIGS[config], "device": chosen.device, "dtype": "bfloat16"}
    return replace(MEASUREMENTS[name], **models, output=output)


def compile_kernels(todo: Mapping[str, Sequence[str]], chosen: argparse.Namespace) -> None:
    """Let a process for each architecture and key size run everything once: then Triton's cache has the kernels."""
    gc.collect()
    torch.cuda.empty_cache()
    start = time.perf_counter()
    # They time nothing, so the variants that they take must not be remembered as the best.
    environment = os.environ | {"FLA_CACHE_RESULTS": "0", "TRITON_CACHE_AUTOTUNING": "0"}
    command = [sys.executable, __file__, "--compile-here", "--device", chosen.device]
    processes = {}
    for (config, names), keys in itertools.product(todo.items(), chosen.key_sizes):
        arguments = ["--config", config, "--key-sizes", str(keys), "--only", *names]
        processes[config, keys] = subprocess.Popen([*command, *arguments], env=environment)
    try:
        failed = [f"{config} K={keys}" for (config, keys), process in processes.items() if process.wait()]
    finally:
        for process in processes.values():
            process.kill()
    tell(f"== kernels compiled in {time.perf_counter() - start:.0f} s")
    if failed:
        tell(f"the processes for {', '.join(failed)} failed; their kernels are compiled when they are warmed up")


def compile_here(chosen: argparse.Namespace) -> None:
    """Run everything once, with the same kernels and as little else as may be."""
    triton.testing.do_bench = run_once
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as folder:
        for config, name in itertools.product(chosen.config, chosen.only):
            request = request_of(config, name, chosen, Path(folder) / f"{config}-{name}.json")
            first = min([request.max_batch_size or 0, *request.decode_batch_sizes])
            benchmark.run(replace(request, max_batch_size=first, rounds=1))


def run_once(call: Callable[[], object], quantiles: Sequence[float] | None = None, **_: object) -> list[float]:
    """Stand in for Triton's timing of a variant: one run compiles it."""
    call()
    return [1.0] * len(quantiles or (0.5,))


def put_together(folder: Path) -> None:
    """Write the JSON file and the picture of each architecture, and print its tables."""
    for config in CONFIGS:
        reports = {name: file_of(folder, config, name) for name in MEASUREMENTS}
        reports = {name: read_json(path) for name, path in reports.items() if path.exists()}
        if not reports:
            continue
        first = next(iter(reports.values()))
        whole = {"settings": {}, "ceilings": {}, "warmup_seconds": {}, "models": first["models"]}
        for name, report in reports.items():
            for part in ("settings", "ceilings", "warmup_seconds"):
                whole[part][name] = report[part]
            for kind in ("mixer", "forward", "decode", "train_step", "largest_batch"):
                if kind in report:
                    whole[kind] = whole.get(kind, []) + report[kind]
        write_json(folder / f"{config}.json", whole, overwrite=True)
        plot_report(whole | {"settings": first["settings"]}, folder / f"{config}.png")
        tell(f"\n### {config}: {first['settings']['device']}, {first['settings']['dtype']}\n")
        for line in table(whole):
            tell(line)


def table(report: dict) -> Iterator[str]:
    """Yield the lines of the Markdown tables: whole sequences, decoding, and the largest batch."""
    sequences = [(kind, entry) for kind in ("mixer", "forward", "train_step") for entry in report.get(kind, [])]
    if sequences:
        yield "| | K | ms (95% interval) | speedup | peak memory, MiB | TFLOP/s |"
        yield "|---|---|---|---|---|---|"
    for kind, entry in sequences:
        yield (
            f"| {kind.replace('_', ' ')}, {entry['batch_size']} x {entry['seq_len']} | {entry['head_k_dim']} "
            f"| {spread(entry['latency_seconds'], 1e3)} | {speedup(entry)} | {entry['peak_memory_bytes'] / 2**20:,.0f} "
            f"| {entry['teraflops']:.0f} ({entry['compute_share']:.0%}) |"
        )
    if report.get("decode"):
        yield ""
        yield "| decode | batch | K | eager, us | graph, us (95% interval) | speedup | times the floor | GB/s |"
        yield "|---|---|---|---|---|---|---|---|"
    for entry in sorted(report.get("decode", []), key=lambda entry: entry["scope"]):
        best = entry["graph"] or entry["eager"]
        graph = spread(best["latency_seconds"], 1e6) if entry["graph"] else ""
        yield (
            f"| {entry['scope']} | {entry['batch_size']} | {entry['head_k_dim']} "
            f"| {entry['eager']['latency_seconds']['median'] * 1e6:,.1f} | {graph} | {speedup(best)} "
            f"| {best['times_floor']:.2f} | {best['gigabytes_per_second']:,.0f} ({best['bandwidth_share']:.0%}) |"
        )
    if report.get("largest_batch"):
        yield ""
        yield "| K | largest batch | ended by | tokens/s |"
        yield "|---|---|---|---|"
    for entry in report.get("largest_batch", []):
        speed = scaled(entry["tokens_per_second"] or 0)
        yield f"| {entry['head_k_dim']} | {entry['batch_size']:,} | {entry['ended_by']} | {speed} |"


def spread(value: dict, factor: float) -> str:
    """Return a median with its interval."""
    low, median, high = (f"{factor * value[name]:.4g}" for name in ("low", "median", "high"))
    return f"{median} ({low}-{high})"


def speedup(entry: dict) -> str:
    """Return what an entry gains over the first key size."""
    return f"{entry['speedup']['median']:.2f}" if "speedup" in entry else "1"


def file_of(folder: Path, config: str, measurement: str) -> Path:
    """Return where a measurement is kept."""
    return folder / config / f"{measurement}.json"


def tell(message: str) -> None:
    """Print at once, for whoever watches a log."""
    print(message, flush=True)


if __name__ == "__main__":
    main()

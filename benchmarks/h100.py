"""How fast pruned key sizes are on a GPU: DeltaNet and Gated DeltaNet of hidden 2048, 16 heads, 128 value channels.

    python benchmarks/h100.py [--output benchmarks/h100] [--only decode-32 ...]
    python benchmarks/h100.py --table

Each measurement is a `keyreduce benchmark` with a file of its own below the output folder. What is there is not made
again, so an interrupted run resumes there. At the end, and with ``--table``, the tables are printed, and each
architecture's files are put together into one JSON file, which `make results` draws. Triton gives each variant of a
kernel 20 ms when it looks for the fastest (its own 100 would add up to minutes in a step of training).
"""

import argparse
import gc
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import triton.testing

from keyreduce.api import benchmark
from keyreduce.api.benchmark import BenchmarkRequest
from keyreduce.cli.benchmark import print_tables
from keyreduce.cli.console import Console
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
    chosen = parser.parse_args()
    failed = [] if chosen.table else measure(chosen)
    put_together(chosen.output)
    if failed:
        sys.exit("\n".join(["not measured:", *failed]))


def measure(chosen: argparse.Namespace) -> list[str]:
    """Make what is not there yet, for each architecture; return which failed, and why.

    Where Triton is known to get fla's gradients wrong, training is refused (``keyreduce/models/miscompiled.py``).
    """
    triton.testing.do_bench = partial(triton.testing.do_bench, warmup=5, rep=20)
    failed = []
    runs = product(chosen.config, [name for name in MEASUREMENTS if name in chosen.only])
    # The kernels of training take minutes more to compile and to tune: all else is measured before.
    for config, name in sorted(runs, key=lambda run: MEASUREMENTS[run[1]].train_step):
        line, output = f"{config} {name}", file_of(chosen.output, config, name)
        if output.exists():
            continue
        gc.collect()  # the models of the last measurement
        models = {"scaling": chosen.key_sizes, "config": CONFIGS[config], "device": chosen.device, "dtype": "bfloat16"}
        try:
            benchmark.run(replace(MEASUREMENTS[name], **models, output=output))
        except (KeyreduceError, RuntimeError) as error:
            line += f": {reason(error)}"
            failed.append(line)
        print(f"== {line}", flush=True)
    return failed


def put_together(folder: Path) -> None:
    """Write the JSON file and the picture of each architecture, and print its tables."""
    for config in CONFIGS:
        reports = {name: file_of(folder, config, name) for name in MEASUREMENTS}
        reports = {name: read_json(path) for name, path in reports.items() if path.exists()}
        if not reports:
            continue
        first = next(iter(reports.values()))
        print(f"\n### {config}: {first['settings']['device']}, {first['settings']['dtype']}\n")
        whole = {"settings": {}, "ceilings": {}, "warmup_seconds": {}, "models": first["models"]}
        for name, report in reports.items():
            print_tables(Console(as_json=False), report)
            for part in ("settings", "ceilings", "warmup_seconds"):
                whole[part][name] = report[part]
            for kind in ("mixer", "forward", "decode", "train_step", "largest_batch"):
                if kind in report:
                    whole[kind] = whole.get(kind, []) + report[kind]
        write_json(folder / f"{config}.json", whole, overwrite=True)


def file_of(folder: Path, config: str, measurement: str) -> Path:
    """Return where a measurement is kept."""
    return folder / config / f"{measurement}.json"


if __name__ == "__main__":
    main()

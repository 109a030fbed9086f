"""How long pruning, converting and verifying a checkpoint take, and how much memory, beside ``cp -r`` of its files.

    python benchmarks/checkpoint.py [--layers 190] [--rounds 5] [--folder FOLDER] [--json figures.json]

It generates a DeltaNet checkpoint of 1.3B parameters (24 layers; 190 make 20 GB), the calibration statistics to prune
it with, and the same model as a DCP. Then all commands are timed in turns, after one round that does not count.
"""

import argparse
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

from checkpoint_inputs import SHARD_SIZE, describe_model, write_source, write_sums
from commands import BARE, COPY, KEYREDUCE, Command, machine, measure_rounds, parse_options, report, standard_commands

from keyreduce.api import convert, prune

# What is added to everything that writes, there in a thread beside the writing, and to `verify`.
CHECKSUMS = """import pathlib, sys
from keyreduce.checkpoint.checksums import checksum
for file in pathlib.Path(sys.argv[1]).glob("*.safetensors"):
    checksum(file)
"""


# Where the inputs lie, and where the output of what is being timed goes.
PLACES = ("source", "calibration", "dcp", "pruned", "output", "work")


def commands_of(paths: SimpleNamespace) -> dict[str, Command]:
    """Return all that is timed, by short name, in the order of the table."""
    source, dcp, output = paths.source, paths.dcp, paths.output
    synced = ("sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", source, output)
    cut = ("--method", "wanda", "--target", "key", "--ratio", "0.5", "--output", output)
    pruned = (*KEYREDUCE, "prune", *cut, "--calibration", paths.calibration, "--work", paths.work)
    converted = (*KEYREDUCE, "convert-dcp", "--work", paths.work)
    to_hf = (*converted, "--max-shard-size", SHARD_SIZE, dcp, output)
    of_dcp = (*pruned, "--model", dcp, "--config", source / "config.json")
    return {
        **standard_commands(source, output),
        "cp-sync": Command("`cp -r`, then `sync` of the copies", source, synced),
        "prune": Command("`keyreduce prune`", source, (*pruned, "--model", source)),
        "prune-dcp": Command("`keyreduce prune` of a DCP", dcp, of_dcp),
        "to-dcp": Command("`keyreduce convert-dcp`, HF to DCP", source, (*converted, source, output)),
        "to-hf": Command("`keyreduce convert-dcp`, DCP to HF", dcp, to_hf),
        "checksums": Command(
            "the checksums of what `prune` made, alone", paths.pruned, (sys.executable, "-c", CHECKSUMS, paths.pruned)
        ),
        "verify": Command(
            "`keyreduce verify` of what `prune` made", paths.pruned, (*KEYREDUCE, "verify", paths.pruned)
        ),
    }


def make_inputs(paths: SimpleNamespace, options: argparse.Namespace) -> str:
    """Make what is not there yet of source, statistics, DCP and pruned checkpoint; return a line about the model."""
    config, tensors = describe_model(hidden=options.hidden, heads=options.heads, layers=options.layers)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    folder, size = paths.source.parent, 2 * parameters
    sums = 8 * 6 * options.layers * options.hidden**2 // options.heads
    present = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    # The source, its DCP, what is pruned and what is being written.
    needed, free = 4 * size + sums - present, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        sys.exit(f"{folder} has {free / 1e9:.1f} GB free; this takes {needed / 1e9:.1f}: give another --folder")
    if paths.calibration.exists() and (paths.source / "config.json").read_text() != config:
        sys.exit(f"{folder} holds another model; give another --folder, or the sizes it was made with")
    # The statistics are written last: where they are, the source is whole.
    if not paths.calibration.exists():
        for path in (paths.source, paths.dcp, paths.pruned):
            shutil.rmtree(path, ignore_errors=True)
        write_source(paths.source, config, tensors)
        write_sums(paths.source, paths.calibration)
    source = str(paths.source)
    convert.run(convert.ConvertRequest(source=source, destination=paths.dcp, work=paths.work))
    cut = {"method": "wanda", "ratio": "0.5", "calibration": paths.calibration, "output": paths.pruned}
    prune.run(prune.PruneRequest(model=source, work=paths.work, **cut))
    shards = len(list(paths.source.glob("*.safetensors")))
    return f"DeltaNet, {parameters / 1e9:.2f}B parameters, bfloat16: {size / 1e9:.2f} GB in {shards} shards."


def main() -> None:
    """Time the commands and print the table."""
    options = parse_options(
        __doc__,
        24,
        5,
        ("--hidden", {"type": int, "default": 2048, "help": "channels of the model"}),
        ("--heads", {"type": int, "default": 16}),
        ("--only", {"nargs": "+", "metavar": "NAME", "help": "rows of the table; cp is always one"}),
    )
    with ExitStack() as stack:
        # What is there in a folder that was given is used again, and stays.
        temporary = options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="keyreduce-"))
        paths = SimpleNamespace(**{name: Path(temporary).resolve() / name for name in PLACES})
        paths.source.parent.mkdir(parents=True, exist_ok=True)
        known = commands_of(paths)
        if unknown := set(options.only or ()) - known.keys():
            sys.exit(f"there is no {', '.join(sorted(unknown))}; --only takes {', '.join(known)}")
        chosen = {name: one for name, one in known.items() if name in {BARE, COPY, *(options.only or known)}}
        load = os.getloadavg()[0]
        facts = f"{make_inputs(paths, options)} {machine(paths.source)}; load before it began {load:.1f}."
        report(facts, measure_rounds(chosen, paths.source, paths.output, options.rounds), options)


if __name__ == "__main__":
    main()

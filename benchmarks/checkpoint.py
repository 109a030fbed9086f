"""How long pruning and converting a checkpoint take, and how much memory, beside ``cp -r`` of the same files.

    python benchmarks/checkpoint.py [--layers 190] [--rounds 5] [--folder FOLDER] [--json figures.json]

It generates a DeltaNet checkpoint of 1.3B parameters (24 layers; 190 make 20 GB), the calibration sums to prune it
with, and the same model as a DCP. Then everything is timed in turns, after one round that does not count. Before each
timing, untimed: earlier outputs are removed, the source is copied and the copy removed, what was written is on the
disk (sync), and the input is read once.

Imports of keyreduce are in the functions: the processes whose memory is measured load this file too.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

from checkpoint_inputs import SHARD_SIZE, describe_model, write_source, write_sums
from processes import Failed, Measured, can_measure, run_command, run_function

KEYREDUCE = (sys.executable, "-m", "keyreduce")


class Paths(NamedTuple):
    """Where the inputs lie, and where the output of what is being timed goes."""

    source: Path
    calibration: Path
    dcp: Path
    pruned: Path
    output: Path
    work: Path

    @classmethod
    def below(cls, folder: Path) -> "Paths":
        return cls(*(folder / name for name in cls._fields))


class Contender(NamedTuple):
    """What is timed: a command, or a function that a process which is started already calls."""

    label: str
    reads: Path
    command: tuple[str | Path, ...] = ()
    prepare: Callable[[Paths], Callable[[], object]] | None = None


def prepare_rewrite(paths: Paths) -> Callable[[], object]:
    """Return the rewrite without half of the key channels: those are drawn, as scattered as any method's choice."""
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.rewrite import rewrite
    from keyreduce.families import family_of
    from keyreduce.pruning.budget import Budget
    from keyreduce.pruning.methods import METHODS
    from keyreduce.pruning.planning import make_plan
    from keyreduce.pruning.prune import plan_edits

    source, method = open_folder(paths.source), METHODS["random"]
    keep = Budget.of(["key"], ratio=["0.5"]).numbers(source.config, None, method, {})
    plan = make_plan(source, method, keep, seed=0, statistics=None, inputs={})
    config = family_of(source.config).resized(source.config, plan.after)
    edits = plan_edits(source, plan)
    paths.output.mkdir()
    return lambda: rewrite(source, paths.output, config=config, edits=edits)


def prepare_hf_to_dcp(paths: Paths) -> Callable[[], object]:
    """Return the conversion to a DCP."""
    from keyreduce.checkpoint.dcp import write_dcp
    from keyreduce.checkpoint.folder import open_folder

    source = open_folder(paths.source)
    paths.output.mkdir()
    return lambda: write_dcp(source, paths.output)


def prepare_dcp_to_hf(paths: Paths) -> Callable[[], object]:
    """Return the conversion of a DCP, into shards as large as those of the source."""
    from keyreduce.checkpoint.find import open_model
    from keyreduce.checkpoint.rewrite import rewrite
    from keyreduce.checkpoint.writing import parse_size

    source = open_model(str(paths.dcp))
    paths.output.mkdir()
    return lambda: rewrite(source, paths.output, max_shard_size=parse_size(SHARD_SIZE))


def commands(paths: Paths) -> dict[str, tuple[str | Path, ...]]:
    """Return the commands, but for the source of ``prune`` and the output of all that write."""
    cut = ("--method", "wanda", "--target", "key", "--ratio", "0.5")
    prune = (*KEYREDUCE, "prune", *cut, "--calibration", paths.calibration, "--work", paths.work)
    convert = (*KEYREDUCE, "convert-dcp", "--work", paths.work)
    return {
        "prune": (*prune, "--model", paths.source, "--output"),
        "prune-dcp": (*prune, "--model", paths.dcp, "--config", paths.source / "config.json", "--output"),
        "convert-to-dcp": (*convert, paths.source),
        "convert-to-hf": (*convert, "--max-shard-size", SHARD_SIZE, paths.dcp),
    }


def contenders(paths: Paths) -> dict[str, Contender]:
    """Return all that is timed, by short name, in the order of the table."""
    source, dcp, output = paths.source, paths.dcp, paths.output
    ours = {name: (*command, output) for name, command in commands(paths).items()}
    synced = ("sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", source, output)
    verify = (*KEYREDUCE, "verify", paths.pruned)
    return {
        "bare": Contender("`import torch`", source, (sys.executable, "-c", "import torch")),
        "cp": Contender("`cp -r`", source, ("cp", "-r", source, output)),
        "cp-sync": Contender("`cp -r`, then `sync` of the copies", source, synced),
        "rewrite": Contender("the rewrite alone", source, prepare=prepare_rewrite),
        "prune": Contender("`keyreduce prune`", source, ours["prune"]),
        "prune-dcp": Contender("`keyreduce prune` of a DCP", dcp, ours["prune-dcp"]),
        "to-dcp": Contender("HF to DCP, the function alone", source, prepare=prepare_hf_to_dcp),
        "convert-to-dcp": Contender("`keyreduce convert-dcp`, HF to DCP", source, ours["convert-to-dcp"]),
        "to-hf": Contender("DCP to HF, the function alone", dcp, prepare=prepare_dcp_to_hf),
        "convert-to-hf": Contender("`keyreduce convert-dcp`, DCP to HF", dcp, ours["convert-to-hf"]),
        "verify": Contender("`keyreduce verify` of what `prune` made", paths.pruned, verify),
    }


def make_inputs(paths: Paths, options: argparse.Namespace) -> str:
    """Make what is not there yet of source, sums, DCP and pruned checkpoint, and return a line about the model."""
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
    # The sums are written last: where they are, the source is whole.
    if not paths.calibration.exists():
        for path in (paths.source, paths.dcp, paths.pruned):
            shutil.rmtree(path, ignore_errors=True)
        write_source(paths.source, config, tensors)
        write_sums(paths.source, paths.calibration)
    for name, target in (("convert-to-dcp", paths.dcp), ("prune", paths.pruned)):
        run_command((*commands(paths)[name], target))
    shards = len(list(paths.source.glob("*.safetensors")))
    return f"DeltaNet, {parameters / 1e9:.2f}B parameters, bfloat16: {size / 1e9:.2f} GB in {shards} shards."


def measure(contender: Contender, paths: Paths) -> Measured:
    """Run a contender once, from the same state of disk and page cache as every other."""
    shutil.rmtree(paths.output, ignore_errors=True)
    # The memory that this takes is free again, and backed: of a virtual machine's, what lay unused for some seconds may
    # have gone back to its host, and a `cp` that must get it again takes several times as long.
    shutil.copytree(paths.source, paths.output)
    shutil.rmtree(paths.output)
    os.sync()
    buffer = bytearray(1 << 24)
    for file in filter(Path.is_file, sorted(contender.reads.rglob("*"))):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return run_command(contender.command) if contender.command else run_function(contender.prepare, paths)


def measure_rounds(chosen: dict[str, Contender], paths: Paths, rounds: int) -> tuple[dict, dict]:
    """Run all in turns, once more than ``rounds``; the first time does not count.

    Returns:
        Name -> what was measured, a list of the rounds; and name -> why it did not run.
    """
    runs, failures = {name: [] for name in chosen}, {}
    for turn in range(rounds + 1):
        for name, contender in chosen.items():
            if name in failures:
                continue
            try:
                runs[name].append(measure(contender, paths))
            except Failed as failure:
                failures[name] = str(failure)
        print(f"round {turn} of {rounds}{'' if turn else ', which does not count'}", file=sys.stderr)
    return {name: found[1:] for name, found in runs.items() if name not in failures}, failures


def machine(folder: Path) -> str:
    """Return what a reader must know of the machine, of the file system of a folder, and of what is installed."""

    def line(number: int, *command: str | Path) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[number]

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "transformers"))
    return (
        f"{len(os.sched_getaffinity(0))} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB"
        f" of memory, Linux {'.'.join(platform.release().split('.')[:2])}, {line(1, 'df', '--output=fstype', folder)}"
        f" file system, {line(0, 'cp', '--version')}, Python {platform.python_version()}, {packages}"
    )


def table(figures: dict) -> str:
    """Return the Markdown table."""
    lines = [
        "| what | seconds | x `cp -r` | peak anonymous memory above bare, MB |",
        "|---|---|---|---|",
    ]
    for row in figures["rows"].values():
        if "failed" in row:
            lines.append(f"| {row['label']} | did not run: {row['failed']} | | |")
            continue
        seconds, times = ("{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in ("seconds", "times_cp"))
        tree, main = row["tree_mb"], row["main_mb"]
        # A tool that needs less than Python with torch has no figure to be compared.
        memory = "-" if tree < 0 else f"{tree:.0f}" + (f", its main process {main:.0f}" if tree - main > 1 else "")
        lines.append(f"| {row['label']} | {seconds} | {times} | {memory} |")
    return "\n".join(lines)


def summarise(chosen: dict[str, Contender], runs: dict[str, list[Measured]], failures: dict[str, str]) -> dict:
    """Return the figures of the table: medians of the rounds with their 95% intervals, and peaks of all rounds."""
    from keyreduce.benchmarking.timing import Timing, ratio

    timings = {name: Timing(tuple(run.seconds for run in found)) for name, found in runs.items()}
    bare_tree, bare_main = (median(getattr(run, field) for run in runs["bare"]) for field in ("tree", "main"))
    rows = {}
    for name, contender in chosen.items():
        if name in failures:
            rows[name] = {"label": contender.label, "failed": failures[name]}
        elif name != "bare":
            times, interval = ratio(timings[name], timings["cp"])
            rows[name] = {
                "label": contender.label,
                "seconds": (timings[name].median, *timings[name].interval),
                "times_cp": (times, *interval),
                "tree_mb": (max(run.tree for run in runs[name]) - bare_tree) / 1e6,
                "main_mb": (max(run.main for run in runs[name]) - bare_main) / 1e6,
                "rounds": [run._asdict() for run in runs[name]],
            }
    return {"rows": rows, "bare": {"seconds": timings["bare"].median, "mb": bare_tree / 1e6}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=2048, help="channels of the model")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; what is there is used again, and stays")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows of the table; cp is always one")
    parser.add_argument("--json", type=Path, help="write the figures, round by round")
    options = parser.parse_args()
    if not can_measure():
        sys.exit("this reads the memory of processes in /proc, as Linux has it, and does not run elsewhere")

    with ExitStack() as stack:
        temporary = options.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="keyreduce-"))
        paths = Paths.below(Path(temporary).resolve())
        paths.source.parent.mkdir(parents=True, exist_ok=True)
        stack.callback(shutil.rmtree, paths.output, ignore_errors=True)
        known = contenders(paths)
        if unknown := set(options.only or ()) - known.keys():
            sys.exit(f"there is no {', '.join(sorted(unknown))}; --only takes {', '.join(known)}")
        load = os.getloadavg()[0]
        try:
            model = make_inputs(paths, options)
        except Failed as failure:
            sys.exit(f"the inputs could not be made: {failure}")
        chosen = {name: one for name, one in known.items() if name in {"bare", "cp", *(options.only or known)}}
        runs, failures = measure_rounds(chosen, paths, options.rounds)
        facts = f"{model} {machine(paths.source)}; load before it began {load:.1f}."
        figures = summarise(chosen, runs, failures)
    bare = figures["bare"]
    print(
        f"{facts}\nMedian of {options.rounds} rounds in turns, with its 95% interval (least and most, if under 6);"
        f" ratios are to the `cp -r` of the same round.\nBare is `python -c 'import torch'`: {bare['seconds']:.2f} s,"
        f" {bare['mb']:.0f} MB of anonymous memory.\n\n{table(figures)}"
    )
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()

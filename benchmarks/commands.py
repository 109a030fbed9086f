"""Commands timed in turns, from the same state of disk and page cache, with the most anonymous memory that they held.

Anonymous memory is what a process allocates, and not the files it maps, which the kernel can drop. It is read from
/proc, as Linux has it. Before each timing, untimed: the last output is removed, the source is copied and the copy
removed, what was written is on the disk (sync), and the input is read once.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

KEYREDUCE = (sys.executable, "-m", "keyreduce")
BARE = "bare"
COPY = "cp"
SAMPLE_SECONDS = 0.005


class Command(NamedTuple):
    """A command that is timed: its row in the table, the folder that it reads, and its words."""

    label: str
    reads: Path
    words: tuple[str | Path, ...]


class Measured(NamedTuple):
    """One run: seconds, and peak anonymous bytes of the process and its descendants together, and of it alone."""

    seconds: float
    tree: int
    main: int


class Failed(Exception):
    """A command ended with an error; the text is the last line that it wrote to stderr."""


def parse_options(doc: str, layers: int, rounds: int, *more: tuple[str, dict]) -> argparse.Namespace:
    """Return the options of a script, those that all have and its own.

    It exits where the system does not say what a process holds, and which children it has.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--layers", type=int, default=layers, help="of the model")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--folder", type=Path, help="where to write")
    parser.add_argument("--json", type=Path, help="write the figures, round by round")
    for name, settings in more:
        parser.add_argument(name, **settings)
    options = parser.parse_args()
    if not Path(f"/proc/self/task/{os.getpid()}/children").is_file():
        sys.exit("this reads the memory of processes in /proc, as Linux has it, and does not run elsewhere")
    return options


def report(facts: str, figures: dict, options: argparse.Namespace) -> None:
    """Print what :func:`measure_rounds` returned, and write it where ``--json`` says."""
    print(f"{facts}\n{table(figures, options.rounds)}")
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, **figures}, indent=2) + "\n")


def family_tree(pid: int) -> Iterator[int]:
    """Yield a process and all its descendants."""
    yield pid
    try:
        # A child is listed under the thread that started it.
        threads = os.listdir(f"/proc/{pid}/task")
        children = [Path(f"/proc/{pid}/task/{thread}/children").read_text() for thread in threads]
    except OSError:
        return  # it has ended meanwhile
    for child in " ".join(children).split():
        yield from family_tree(int(child))


def anonymous_bytes(pid: int) -> int:
    """Return the resident anonymous memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def run_command(words: tuple[str | Path, ...]) -> Measured:
    """Run a command and measure it from its start to its end.

    Raises:
        Failed: it ended with an error.
    """
    held, ended = [(0, 0)], threading.Event()  # bytes of the process and its descendants, and of it alone

    def sample(pid: int) -> None:
        while not ended.wait(SAMPLE_SECONDS):
            each = [anonymous_bytes(one) for one in family_tree(pid)]
            held.append((sum(each), each[0]))

    with tempfile.TemporaryFile() as errors:
        start = perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=errors)
        sampler = threading.Thread(target=sample, args=(process.pid,))
        sampler.start()
        code = process.wait()
        seconds = perf_counter() - start
        ended.set()
        sampler.join()
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if code != 0:
        raise Failed(said[-1] if said else f"it ended with code {code}")
    tree, main = map(max, zip(*held, strict=True))
    return Measured(seconds, tree, main)


def standard_commands(source: Path, output: Path) -> dict[str, Command]:
    """Return the two that every table has: what importing torch takes, and a copy of the source."""
    return {
        BARE: Command("`import torch`", source, (sys.executable, "-c", "import torch")),
        COPY: Command("`cp -r`", source, ("cp", "-r", source, output)),
    }


def measure(command: Command, source: Path, output: Path) -> Measured:
    """Run a command once, from the same state of disk and page cache as every other."""
    shutil.rmtree(output, ignore_errors=True)
    # The memory that this takes is free again, and backed: of a virtual machine's, what lay unused for some seconds may
    # have gone back to its host, and a `cp` that must get it again takes several times as long.
    shutil.copytree(source, output)
    shutil.rmtree(output)
    os.sync()
    buffer = bytearray(1 << 24)
    for file in filter(Path.is_file, sorted(command.reads.rglob("*"))):
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return run_command(command.words)


def measure_rounds(commands: Mapping[str, Command], source: Path, output: Path, rounds: int) -> dict:
    """Run all in turns, once more than ``rounds``, of which the first time does not count.

    Returns:
        A JSON object: ``rows``, for each command its ``label``, and either ``failed``, why it did not run, or the
        medians of the rounds with their 95% intervals, ``seconds`` and ``times_cp``, the peaks of all rounds above bare
        Python with torch, ``tree_mb`` and ``main_mb``, and the ``rounds``; and ``bare``, what that takes.
    """
    runs, failures = {name: [] for name in commands}, {}
    for turn in range(rounds + 1):
        for name, command in commands.items():
            if name in failures:
                continue
            try:
                runs[name].append(measure(command, source, output))
            except Failed as failure:
                failures[name] = str(failure)
        print(f"round {turn} of {rounds}{'' if turn else ', which does not count'}", file=sys.stderr)
    shutil.rmtree(output, ignore_errors=True)
    runs = {name: found[1:] for name, found in runs.items() if name not in failures}
    rows = {name: {"label": commands[name].label, "failed": failure} for name, failure in failures.items()}
    bare = {name: median(getattr(run, name) for run in runs[BARE]) for name in Measured._fields}
    rows |= {name: _row(commands[name].label, runs[name], runs[COPY], bare) for name in runs if name != BARE}
    return {
        "rows": {name: rows[name] for name in commands if name in rows},
        "bare": {"seconds": bare["seconds"], "mb": bare["tree"] / 1e6},
    }


def _row(label: str, runs: list[Measured], copies: list[Measured], bare: Mapping[str, float]) -> dict:
    from keyreduce.benchmarking.timing import RoundTimes, ratio

    timing, copied = (RoundTimes(tuple(run.seconds for run in found)) for found in (runs, copies))
    times, interval = ratio(timing, copied)
    return {
        "label": label,
        "seconds": (timing.median, *timing.interval),
        "times_cp": (times, *interval),
        "tree_mb": (max(run.tree for run in runs) - bare["tree"]) / 1e6,
        "main_mb": (max(run.main for run in runs) - bare["main"]) / 1e6,
        "rounds": [run._asdict() for run in runs],
    }


def table(figures: dict, rounds: int) -> str:
    """Return the figures of :func:`measure_rounds` as Markdown."""
    bare = figures["bare"]
    lines = [
        f"Median of {rounds} rounds in turns, with its 95% interval (least and most, if under 6); ratios are to the"
        " `cp -r` of the same round.",
        f"Bare is `python -c 'import torch'`: {bare['seconds']:.2f} s, {bare['mb']:.0f} MB of anonymous memory.\n",
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


def machine(folder: Path) -> str:
    """Return what a reader must know of the machine, of the file system of a folder, and of what is installed."""

    def line(number: int, *words: str | Path) -> str:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[number]

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "transformers"))
    return (
        f"{len(os.sched_getaffinity(0))} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB"
        f" of memory, Linux {'.'.join(platform.release().split('.')[:2])}, {line(1, 'df', '--output=fstype', folder)}"
        f" file system, {line(0, 'cp', '--version')}, Python {platform.python_version()}, {packages}"
    )

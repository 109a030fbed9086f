"""How much of the damage of pruning each recovery takes back, and training against the tokens that it takes.

    python benchmarks/recovery_study.py --output FOLDER [--model PATH] [--calibration FILE] [--heldout FILE]
        [--methods rrqr] [--ratios 0.25 0.5 0.75] [--repairs none least-squares reconstruct:scope=mixer,lr=0.001]
        [--kinds lora full lora-distilled full-distilled:lr=0.001,temperature=1,batch_size=16]
        [--tokens 250000 1000000 4000000] [--num-batches 64] [--heldout-rows 64] [--recall] [--seeds 0 1] [--jobs 4]
    python benchmarks/recovery_study.py ... --table

A repair is a mode of `keyreduce recover` that goes layer by layer. A kind is one that trains the model after it,
distilled or not from the dense model. After a colon come the options that are not their defaults. Both take the
calibration text, and each seed another order of it. Each number of tokens is a run of its own, with its own schedule.

Each run is a file of its own below the output folder, and one that is there is not made again, so a run that was cut
off goes on where it was. With --jobs so many processes share the runs. At the end, and with --table, which makes no
run, all runs that are there are printed as Markdown: the increase of perplexity over the dense model in percent, and
with --recall how often the right answer is preferred to seven others; the mean over the seeds and half the distance
between the extremes.
"""

import argparse
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from math import gcd
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from keyreduce.api import calibrate, evaluate, prune, recover
from keyreduce.api.request import specs
from keyreduce.checkpoint.find import open_model
from keyreduce.data.text import FileText, text_source
from keyreduce.devices import pick_device
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json, write_json
from keyreduce.recovery.overlap import refuse_overlap

_DISTILLED = "-distilled"


class Start(NamedTuple):
    """A pruned model, recovered or not: the fields are options of this script."""

    method: str
    ratio: str
    repair: str
    seed: int

    @property
    def name(self) -> str:
        """The name of its files."""
        return slug("-".join(map(str, self)))


def recovery_of(text: str) -> dict:
    """Return the fields of a recovery from ``mode[-distilled]`` or ``mode[-distilled]:field=value,...``."""
    name, _, rest = text.partition(":")
    given = dict(part.split("=") for part in rest.split(",") if part)
    fields = specs(recover.RecoverRequest)
    taught = {"distill_weight": 1.0} if name.endswith(_DISTILLED) else {}
    values = {field: fields[field].kind(value) for field, value in given.items()}
    return {"mode": name.removesuffix(_DISTILLED), **taught, **values}


class Study:
    """One dense model, and what is done to it and measured.

    Args:
        arguments: the options of this script.

    Raises:
        KeyreduceError: a document is in both texts.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self._rows = {"batch_size": arguments.batch_size, "seq_len": arguments.seq_len}
        self._common = {"device": arguments.device, "work": arguments.output / "work"}
        if arguments.calibration and arguments.heldout:
            refuse_overlap(FileText(arguments.calibration), FileText(arguments.heldout))

    def calibrate(self, seed: int) -> Path:
        """Return the calibration file of a seed; it is made unless it is there."""
        request = calibrate.CalibrateRequest(
            model=self.arguments.model,
            text=self.arguments.calibration,
            num_batches=self.arguments.calibration_batches or self.arguments.num_batches,
            # With gradients, fla's kernels leave the place to PyTorch's, which take float32 on any device.
            gradients=pick_device(self.arguments.device).type != "cpu",
            dtype="float32",
            seed=seed,
            output=self.arguments.output / f"calibration-{seed}.safetensors",
            **self._rows,
            **self._common,
        )
        return calibrate.run(request).calibration

    def start(self, start: Start, target: Path) -> recover.RecoverResult | None:
        """Prune the model into a folder, and recover it unless ``repair`` is ``none``."""
        is_repaired = start.repair != "none"
        pruned = target.with_name(f"{target.name}-pruned") if is_repaired else target
        request = prune.PruneRequest(
            model=self.arguments.model,
            calibration=self.calibrate(start.seed),
            method=start.method,
            ratio=start.ratio,
            seed=start.seed,
            output=pruned,
            **self._common,
        )
        prune.run(request)
        return self.recover(pruned, start.repair, start.seed, target) if is_repaired else None

    def recover(self, pruned: Path, how: str, seed: int, target: Path, **fields: object) -> recover.RecoverResult:
        """Recover a pruned model into a folder, as :func:`recovery_of` reads ``how``; it overrules ``fields``."""
        given = {"num_batches": self.arguments.num_batches, **self._rows, **self._common, **fields, **recovery_of(how)}
        request = recover.RecoverRequest(
            compressed=str(pruned), text=self.arguments.calibration, seed=seed, output=target, **given
        )
        return recover.run(request)

    def measure(self, folder: Path | None) -> dict:
        """Return ``perplexity`` per token of the held-out text, in rows of 1,024 tokens, and ``recall`` if wanted.

        That is, for each kind of recall, how often the model prefers the right answer to seven others. Lengths, numbers
        of pairs and of sequences are those of `keyreduce eval --recall`, the haystacks held-out text.

        Args:
            folder: the model; None is the dense one.
        """
        batch_size = gcd(self.arguments.heldout_rows, 8)
        with tempfile.TemporaryDirectory(prefix="keyreduce-") as temporary:
            request = evaluate.EvaluateRequest(
                model=self.arguments.model if folder is None else str(folder),
                text=self.arguments.heldout,
                num_batches=self.arguments.heldout_rows // batch_size,
                batch_size=batch_size,
                seq_len=1024,
                recall=("mqar", "needle") if self.arguments.recall else (),
                output=Path(temporary) / "metrics.json",
                **self._common,
            )
            (found,) = evaluate.run(request).models
        recall = found.get("recall", {}).items()
        right = {kind: mean(cell["choice_accuracy"] for cell in cells) for kind, cells in recall}
        return {"perplexity": found["perplexity_per_token"], "recall": right}


def main() -> None:
    """Make what is missing, and print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--model")
    parser.add_argument("--calibration", type=Path, nargs="+", default=(), help="by default the standard library")
    parser.add_argument("--heldout", type=Path, nargs="+", default=(), help="by default other files of that")
    parser.add_argument("--heldout-rows", type=int, default=0, help="of 1,024 tokens, by default all")
    parser.add_argument("--methods", nargs="+", default=["rrqr"])
    parser.add_argument("--ratios", nargs="+", default=["0.5", "0.75"])
    parser.add_argument("--repairs", nargs="+", default=["none", "least-squares"])
    parser.add_argument("--kinds", nargs="*", default=["lora", "full", "lora-distilled", "full-distilled"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[250_000, 1_000_000, 4_000_000])
    parser.add_argument("--num-batches", type=int, default=64, help="of a repair")
    parser.add_argument("--calibration-batches", type=int, help="of the choice of channels; by default as many")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--recall", action="store_true", help="measure it too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--table", action="store_true", help="make no run")
    chosen = parser.parse_args()
    for kind in chosen.kinds:
        recovery_of(kind)
    if not chosen.table:
        make(chosen)
    print_tables(chosen.output)


def make(chosen: argparse.Namespace) -> None:
    """Make all runs that are not there, the numbers of tokens in the order given."""
    study = Study(chosen)
    texts = (text_source(chosen.calibration, default="calibration"), text_source(chosen.heldout, default="heldout"))
    inputs = {"model": open_model(chosen.model).identity, "texts": [text.identity for text in texts]}
    inputs |= {name: getattr(chosen, name) for name in ("heldout_rows", "num_batches", "recall")}
    path = chosen.output / "dense.json"
    if not path.exists():
        write_json(path, {"inputs": inputs, **study.measure(None)})
    if read_json(path)["inputs"] != inputs:
        sys.exit(f"{chosen.output} holds runs of another model, other text or another amount; give another --output")
    for seed in chosen.seeds:
        study.calibrate(seed)
    starts = [Start(*one) for one in product(chosen.methods, chosen.ratios, chosen.repairs, chosen.seeds)]
    in_processes(make_start, [(chosen, start) for start in starts], chosen.jobs)
    runs = product(chosen.tokens, starts, chosen.kinds)
    in_processes(make_run, [(chosen, start, kind, tokens) for tokens, start, kind in runs], chosen.jobs)


def in_processes(function: Callable[..., None], calls: Iterable[tuple], jobs: int) -> None:
    """Call a function with each of the arguments, in so many processes; with one job in this one."""
    if jobs == 1:
        for arguments in calls:
            function(*arguments)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(function, *arguments) for arguments in calls]):
            done.result()


def make_start(chosen: argparse.Namespace, start: Start) -> None:
    """Make the model to begin with and measure it, unless that was done."""
    path, folder = chosen.output / start.name / "start.json", chosen.output / "starts" / start.name
    if path.exists():
        return
    study = Study(chosen)
    result = study.start(start, folder)
    run = {**start._asdict(), "kind": None, "tokens": 0, "seconds": 0.0, **study.measure(folder)}
    if result is not None:
        run |= {"seconds": result.seconds, "layers": result.layers}
    write_json(path, run)
    print(f"{start.name}: {run['perplexity']:.4f}, {run['seconds']:.0f} s", flush=True)


def make_run(chosen: argparse.Namespace, start: Start, kind: str, tokens: int) -> None:
    """Train the model of a start on about so many tokens and measure it, unless that was done."""
    path = chosen.output / start.name / f"{slug(f'{kind}-{tokens}')}.json"
    if path.exists():
        return
    study, given = Study(chosen), recovery_of(kind)
    batch_size, seq_len = given.get("batch_size", 8), given.get("seq_len", 512)
    steps = max(1, round(tokens / (batch_size * seq_len)))
    fields = {"batch_size": batch_size, "seq_len": seq_len, "num_batches": steps, "save_every": steps}
    told = path.relative_to(chosen.output)
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as temporary:
        target = Path(temporary) / "trained"
        try:
            result = study.recover(chosen.output / "starts" / start.name, kind, start.seed, target, **fields)
            measured = study.measure(target)
        except KeyreduceError as error:  # such as a loss that became NaN: the next run may do better
            print(f"{told}: {error}", flush=True)
            return
    run = {**start._asdict(), "kind": kind, "tokens": tokens, "trained_tokens": result.tokens, **measured}
    run |= {name: getattr(result, name) for name in ("passes", "seconds", "loss_first", "loss_last")}
    write_json(path, run | {"options": fields | given})
    print(f"{told}: {run['perplexity']:.4f}, {run['seconds']:.0f} s", flush=True)


def slug(text: str) -> str:
    """Return a name for a file."""
    return re.sub(r"[^\w.-]", "_", text)


def print_tables(output: Path) -> None:
    """Print how much higher perplexity is than that of the dense model, and recall, if that was measured."""
    dense = read_json(output / "dense.json")
    runs = [run for path in sorted(output.glob("*/*.json")) if "kind" in (run := read_json(path))]
    title = f"perplexity of the dense model {dense['perplexity']:.4f}; increase over it by tokens trained"
    print(f"\n{title}; seconds of the longest run\n")
    print_table(runs, lambda run: 100 * (run["perplexity"] / dense["perplexity"] - 1), "+.1f")
    for kind, right in dense["recall"].items():
        print(f"\n{kind}, right answers of eight; the dense model {100 * right:.1f}%\n")
        print_table(runs, lambda run, kind=kind: 100 * run["recall"][kind], ".1f")


def print_table(runs: list[dict], read: Callable[[dict], float], form: str) -> None:
    """Print each start x kind by tokens: the mean over seeds of what ``read`` finds in a run, in percent."""
    columns = sorted({run["tokens"] for run in runs} - {0})
    head = "".join(f" {count / 1e6:g}M |" for count in columns)
    print(f"| method | pruned | first | training | 0 |{head} s |\n|{'---|' * (len(columns) + 6)}")
    trained = {tuple(run[name] for name in Start._fields[:3]) for run in runs if run["kind"]}
    rows = {(*(run[name] for name in Start._fields[:3]), run["kind"] or "") for run in runs}
    for *start, kind in sorted(rows):
        if not kind and tuple(start) in trained:
            continue  # it is in the column of no tokens
        of_row = [
            run for run in runs
            if [run[name] for name in Start._fields[:3]] == start and run["kind"] in (None, kind or None)
        ]  # fmt: skip
        cells = [[read(run) for run in of_row if run["tokens"] == count] for count in (0, *columns)]
        told = [f"{mean(values):{form}}{spread(values)}%" if values else "" for values in cells]
        seconds = max(run["seconds"] for run in of_row)
        method, ratio, repair = start
        print(f"| {method} | {float(ratio):.0%} | {repair} | {kind} | {' | '.join(told)} | {seconds:.0f} |")


def spread(values: list[float]) -> str:
    """Return half the distance between the extremes of several values."""
    return f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""


if __name__ == "__main__":
    main()

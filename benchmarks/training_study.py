"""How much of the damage of pruning training takes back, against the tokens that it takes, on one model.

    python benchmarks/training_study.py --output FOLDER [--model PATH] [--calibration FILE] [--heldout FILE]
        [--methods rrqr] [--ratios 0.5 0.75] [--repairs none least-squares] [--tokens 250000 1000000 4000000]
        [--kinds lora full lora-distilled full-distilled full-distilled:lr=0.001,temperature=1,batch_size=16]
        [--num-batches 64] [--heldout-rows 64] [--seeds 0] [--jobs 4]
    python benchmarks/training_study.py ... --table

A repair comes before the training and a kind is the training: a mode of `keyreduce recover`, distilled or not from the
dense model, after a colon the options that are not its defaults. The calibration text is what is trained on. Each
number of tokens is a run of its own, along its own schedule.

Each run is a file of its own below the output folder, and one that is there is not made again, so a run that was cut
off goes on where it was. Processes that are given the same folder share the work: each takes runs that no other has.
With --jobs the script starts so many. At the end, and with --table, which makes no run, all runs that are there are
printed as Markdown: the increase of perplexity over the dense model, in percent.
"""

import argparse
import contextlib
import fcntl
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

from keyreduce.recovery.repair import Repaired
from keyreduce.recovery.training.settings import Training, make_training
from study import Study, add_arguments, parse_options

from keyreduce.calibration.run import Settings
from keyreduce.checkpoint.folder import open_folder
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json, write_json
from keyreduce.recovery.layers import Recovered
from keyreduce.recovery.modes import Training, make_training
from keyreduce.recovery.training.run import train
from keyreduce.recovery.writing import write_recovered

_DISTILLED = "-distilled"
_OPTIONS = {
    **{"lr": float, "warmup": float, "distill_weight": float, "temperature": float},
    **{"lora_rank": int, "lora_alpha": float, "batch_size": int, "seq_len": int},
}


class Start(NamedTuple):
    """The model that a training begins with: the fields are options of this script."""

    method: str
    ratio: str
    repair: str
    seed: int


def main() -> None:
    """Make what is missing, and print what is there."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, ratios=["0.5", "0.75"], repairs=["none", "least-squares"])
    parser.add_argument("--methods", nargs="+", default=["rrqr"])
    parser.add_argument("--kinds", nargs="+", default=["lora", "full", "lora-distilled", "full-distilled"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[250_000, 1_000_000, 4_000_000])
    parser.add_argument("--output", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--starts", type=Path, help="the folder of the models to begin with, by default in --output")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--table", action="store_true", help="make no run")
    chosen = parser.parse_args()
    for kind in chosen.kinds:
        parse_kind(kind)
    if not chosen.table:
        make(chosen) if chosen.jobs == 1 else make_in_processes(chosen)
    print_table(chosen.output)


def make_in_processes(chosen: argparse.Namespace) -> None:
    """Let processes of their own, with logs in the output folder, make the runs."""
    command = [sys.executable, __file__, *sys.argv[1:], "--jobs", "1"]
    jobs = [Job(f"process {number}", command, chosen.output / f"{number}.log") for number in range(chosen.jobs)]
    for outcome in run_jobs(jobs, workers=chosen.jobs):
        if not outcome.ok:
            tell(f"{outcome.job.name} failed: {outcome.message}")


def make(chosen: argparse.Namespace) -> None:
    """Make all runs that are neither there nor being made, the numbers of tokens in the order given."""
    study = Study(chosen, "train")
    with claimed(chosen.output / "dense", wait=True):
        path = chosen.output / "dense.json"
        inputs = {"model": study.dense.identity, "text": study.text.identity, "heldout": study.heldout.identity}
        inputs |= {"heldout_rows": study.heldout_rows, **study.settings(0)._asdict()}
        if not path.exists():
            write_json(path, {"inputs": inputs, "perplexity": study.measure(study.dense.path)})
        if read_json(path)["inputs"] != inputs:
            sys.exit(f"{chosen.output} holds runs of another model or other text; give another --output")
    starts = [Start(*one) for one in product(chosen.methods, chosen.ratios, chosen.repairs, chosen.seeds)]
    for tokens, start, kind in product(chosen.tokens, starts, chosen.kinds):
        path = file_of(chosen.output, start, f"{kind}-{tokens}")
        with claimed(path, wait=False) as is_mine:
            if not is_mine or path.exists():
                continue
            folder = make_start(study, chosen, start)
            run = {**start._asdict(), "kind": kind, "tokens": tokens}
            try:
                run |= run_one(study, folder, kind, tokens, start.seed)
            except KeyreduceError as error:  # such as a loss that became NaN: the next run may do better
                tell(f"{path.relative_to(chosen.output)}: {error}")
                continue
            write_json(path, run)
            tell(f"{path.relative_to(chosen.output)}: {run['perplexity']:.4f}, {run['seconds']:.0f} s")


def make_start(study: Study, chosen: argparse.Namespace, start: Start) -> Path:
    """Return the folder of the model to begin with; make it and measure it unless that was done."""
    folder = (chosen.starts or chosen.output / "starts") / slug("-".join(map(str, start)))
    path = file_of(chosen.output, start, "start")
    with claimed(folder, wait=True):
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix="keyreduce-") as temporary:
                is_repaired = start.repair != "none"
                made = Path(temporary) / "pruned" if is_repaired else folder
                pruned = study.prune(study.calibrate(start.seed), start.method, start.ratio, start.seed, made)
                if is_repaired:
                    study.repair(pruned, start.repair, start.seed, folder)
        if not path.exists():
            run = {**start._asdict(), "kind": None, "tokens": 0, "perplexity": study.measure(folder), "seconds": 0.0}
            write_json(path, run)
    return folder


def run_one(study: Study, folder: Path, kind: str, tokens: int, seed: int) -> dict:
    """Train the model of a folder on about so many tokens and measure it; return the figures."""
    mode, is_distilled, training, rows = parse_kind(kind)
    batch_size, seq_len = rows
    settings = Settings(max(1, round(tokens / (batch_size * seq_len))), batch_size, seq_len, seed)
    source = open_folder(folder)
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as temporary:
        start = time.perf_counter()
        trained = train(
            source,
            study.dense if is_distilled else None,
            study.text,
            settings,
            mode,
            training._replace(save_every=settings.num_batches),
            device=study.device,
            folder=Path(temporary) / "checkpoints",
            inputs={},
        )
        seconds = time.perf_counter() - start
        recovered, made = Recovered(trained.tensors, trained.tokens, {}), Path(temporary) / "trained"
        write_recovered(source, recovered, made, inputs={"mode": mode}, seconds=seconds)
        perplexity = study.measure(made)
    losses = [[step, round(loss, 5)] for step, loss in zip(trained.steps, trained.losses, strict=True)]
    return {
        "trained_tokens": trained.tokens,
        "passes": trained.passes,
        "perplexity": perplexity,
        "seconds": seconds,
        "device": str(study.device),
        "options": {"batch_size": batch_size, "seq_len": seq_len, **training.describe(mode, is_distilled=is_distilled)},
        "losses": losses,
    }


def parse_kind(text: str) -> tuple[str, bool, Training, tuple[int, int]]:
    """Return the mode, whether the dense model teaches, how to train, and the rows of a step and their tokens."""
    name, options = parse_options(text, _OPTIONS)
    mode, is_distilled = name.removesuffix(_DISTILLED), name.endswith(_DISTILLED)
    rows = options.pop("batch_size", 8), options.pop("seq_len", 512)
    return mode, is_distilled, make_training(mode, options), rows


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Keep other processes from making ``path``; yield whether it is ours to make, which it is after a wait.

    The claim ends with the block, or with the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f"{path.name}.lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def file_of(output: Path, start: Start, name: str) -> Path:
    """Return where a run is kept."""
    return output / slug("-".join(map(str, start))) / f"{slug(name)}.json"


def slug(text: str) -> str:
    """Return a name for a file."""
    return re.sub(r"[^\w.-]", "_", text)


def print_table(output: Path) -> None:
    """Print each start x kind: how much higher than that of the dense model perplexity is, by tokens."""
    dense = read_json(output / "dense.json")["perplexity"]
    runs = [read_json(path) for path in sorted(output.glob("*/*.json"))]
    columns = sorted({run["tokens"] for run in runs} - {0})
    print(f"\nperplexity of the dense model {dense:.4f}; increase over it by tokens trained; the longest run\n")
    print(f"| method | pruned | first | training | 0 | {' | '.join(f'{count / 1e6:g}M' for count in columns)} | s |")
    print(f"|{'---|' * (len(columns) + 6)}")
    rows = sorted({tuple(run[name] for name in ("method", "ratio", "repair", "kind")) for run in runs if run["kind"]})
    for row in rows:
        of_start = [run for run in runs if (run["method"], run["ratio"], run["repair"]) == row[:3]]
        cells, seconds = [], []
        for count in (0, *columns):
            found = [run for run in of_start if run["tokens"] == count and run["kind"] in (None, row[3])]
            rises = [100 * (run["perplexity"] / dense - 1) for run in found]
            seconds += [run["seconds"] for run in found]
            spread = f" ± {(max(rises) - min(rises)) / 2:.1f}" if len(rises) > 1 else ""
            cells.append(f"{sum(rises) / len(rises):+.1f}{spread}%" if rises else "")
        method, ratio, repair, kind = row
        print(f"| {method} | {float(ratio):.0%} | {repair} | {kind} | {' | '.join(cells)} | {max(seconds):.0f} |")


def tell(message: str) -> None:
    """Print at once, for whoever watches a log."""
    print(message, flush=True)


if __name__ == "__main__":
    main()

"""How much of the damage of pruning each recovery takes back, and training against the tokens that it takes.

    python benchmarks/recovery_study.py --output FOLDER [--model PATH] [--calibration FILE] [--heldout FILE]
        [--methods rrqr] [--ratios 0.25 0.5 0.75] [--repairs none least-squares reconstruct:scope=mixer,lr=0.001]
        [--kinds lora full lora-distilled full-distilled:lr=0.001,temperature=1,batch_size=16]
        [--tokens 250000 1000000 4000000] [--num-batches 64] [--heldout-rows 64] [--recall] [--seeds 0 1] [--jobs 4]
    python benchmarks/recovery_study.py ... --table [--summary FILE.json]

A ratio is a share of the key channels, or `state=SHARE` of the state, whose sizes `keyreduce prune --state-ratio`
chooses. A repair is a mode of `keyreduce recover` that goes layer by layer; with `none` the cut has its corrections,
with `exact` not even these. A kind is one that trains the model after
it, distilled or not from the dense model. After a colon come the options that are not their defaults. Both take the
calibration text, and each seed another order of it. Each number of tokens is a run of its own, with its own schedule.

Each run is a file of its own below the output folder, and one that is there is not made again, so a run that was cut
off resumes where it was. With --jobs so many processes share the runs. At the end, and with --table, which makes no
run, all runs that are there are printed as Markdown: the increase of perplexity over the dense model in percent, and
with --recall how often the right answer is preferred to seven others; the mean over the seeds and half the distance
between the extremes.
"""

import argparse
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from math import gcd
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from budget_study import chosen_sizes, recovery_of
from recovery_tables import recovery_tables
from result_tables import UNREPAIRED

from keyreduce.api import calibrate, evaluate, prune, recover
from keyreduce.checkpoint.find import find_model, open_model
from keyreduce.data.batches import spread_of
from keyreduce.data.text import FileText, text_source
from keyreduce.devices import device_name, pick_device
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json, write_json
from keyreduce.pruning.methods import method_named
from keyreduce.recovery.overlap import refuse_overlap


class Start(NamedTuple):
    """A pruned model, recovered or not: the fields are options of this script."""

    method: str
    ratio: str
    repair: str
    seed: int


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
    parser.add_argument("--sizes-for", metavar="REPAIR", help="one choice of sizes for all; by default each its own")
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
    parser.add_argument("--summary", type=Path, help="a file for what all runs that are there have measured")
    chosen = parser.parse_args()
    for kind in chosen.kinds:
        recovery_of(kind)
    if not chosen.table:
        make_all(chosen)
    summary = summary_of(chosen)
    print("", *recovery_tables(summary), sep="\n")
    if chosen.summary:
        write_json(chosen.summary, summary, overwrite=True)


def make_all(chosen: argparse.Namespace) -> None:
    """Make all runs that are not there, the numbers of tokens in the order given."""
    make_dense(chosen)
    for seed in chosen.seeds:
        calibration_file(chosen, seed)
    starts = [Start(*one) for one in product(chosen.methods, chosen.ratios, chosen.repairs, chosen.seeds)]
    in_processes(make_start, [(chosen, start) for start in starts], chosen.jobs)
    runs = product(chosen.tokens, starts, chosen.kinds)
    in_processes(make_run, [(chosen, start, kind, tokens) for tokens, start, kind in runs], chosen.jobs)


def make_dense(chosen: argparse.Namespace) -> None:
    """Measure the dense model, unless that was done, and refuse runs of another model or text than are there."""
    if chosen.calibration and chosen.heldout:
        refuse_overlap(FileText(chosen.calibration), FileText(chosen.heldout))
    texts = (text_source(chosen.calibration, default="calibration"), text_source(chosen.heldout, default="heldout"))
    inputs = {"model": open_model(chosen.model).identity, "texts": [text.identity for text in texts]}
    inputs |= {name: getattr(chosen, name) for name in ("heldout_rows", "num_batches", "recall")}
    path = chosen.output / "dense.json"
    if not path.exists():
        write_json(path, {"inputs": inputs, **measure(chosen, chosen.model)})
    if read_json(path)["inputs"] != inputs:
        sys.exit(f"{chosen.output} holds runs of another model, other text or another amount; give another --output")


def in_processes(function: Callable[..., None], calls: Sequence[tuple], jobs: int) -> None:
    """Call a function with each of the arguments, in so many processes; with one job in this one."""
    if jobs == 1:
        for arguments in calls:
            function(*arguments)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(function, *arguments) for arguments in calls]:
            done.result()


def make_start(chosen: argparse.Namespace, start: Start) -> None:
    """Prune the model, recover it if ``repair`` is a mode of that, and measure it, unless that was done."""
    path, folder = files_of(chosen, start)
    if path.exists():
        return
    pruned = folder if start.repair in UNREPAIRED else folder.with_name(f"{folder.name}-pruned")
    request = prune.PruneRequest(
        model=chosen.model,
        calibration=calibration_file(chosen, start.seed),
        method=start.method,
        seed=start.seed,
        output=pruned,
        **cut_of(chosen, start),
        **common(chosen),
    )
    result = prune.run(request)
    assert isinstance(result, prune.PruneResult)
    sizes = [result.key_heads[1], result.head_k_dim[1], result.head_v_dim[1]]
    run = {**start._asdict(), "kind": None, "tokens": 0, "seconds": 0.0, "sizes": sizes}
    if start.repair not in UNREPAIRED:
        fields = {"num_batches": chosen.num_batches, **rows_of(chosen), **recovery_of(start.repair)}
        result = recover_into(folder, chosen, pruned, start.seed, fields)
        run |= {"seconds": result.seconds, "layers": result.layers, "spread": spread_of(result.tokens)}
    write_run(chosen, path, run | measure(chosen, folder))


def cut_of(chosen: argparse.Namespace, start: Start) -> dict:
    """Return the fields of a request that say what a start removes."""
    if not start.ratio.startswith("state="):
        return {"ratio": start.ratio}
    how = {"model": chosen.model, "calibration": calibration_file(chosen, start.seed), "text": chosen.calibration}
    how |= {**common(chosen), "seed": start.seed}
    sizes = chosen_sizes(chosen.output / "work", start.ratio, chosen.sizes_for or start.repair, how)
    return {"uncorrected": start.repair != "none", **sizes}


def make_run(chosen: argparse.Namespace, start: Start, kind: str, tokens: int) -> None:
    """Train the model of a start on about so many tokens and measure it, unless that was done."""
    of_start, folder = files_of(chosen, start)
    path = of_start.with_name(f"{slug(f'{kind}-{tokens}')}.json")
    if path.exists():
        return
    fields = {"batch_size": 8, "seq_len": 512, **recovery_of(kind)}
    steps = max(1, round(tokens / (fields["batch_size"] * fields["seq_len"])))
    fields = {"num_batches": steps, "save_every": steps, **fields}
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as temporary:
        target = Path(temporary) / "trained"
        try:
            result = recover_into(target, chosen, folder, start.seed, fields)
            measured = measure(chosen, target)
        except KeyreduceError as error:  # such as a loss that became NaN: the next run may do better
            print(f"{path.relative_to(chosen.output)}: {error}", flush=True)
            return
    run = {**start._asdict(), "kind": kind, "tokens": tokens, "sizes": read_json(of_start)["sizes"], **measured}
    run |= {"trained_tokens": result.tokens}
    run |= {name: getattr(result, name) for name in ("passes", "seconds", "loss_first", "loss_last")}
    write_run(chosen, path, run | {"options": fields})


def files_of(chosen: argparse.Namespace, start: Start) -> tuple[Path, Path]:
    """Return where the figures of a start are kept, and where its model is."""
    name = slug("-".join(map(str, start)))
    return chosen.output / name / "start.json", chosen.output / "starts" / name


def write_run(chosen: argparse.Namespace, path: Path, run: dict) -> None:
    write_json(path, run)
    print(f"{path.relative_to(chosen.output)}: {run['perplexity']:.4f}, {run['seconds']:.0f} s", flush=True)


def common(chosen: argparse.Namespace) -> dict:
    """Return the fields that all requests share."""
    return {"device": chosen.device, "work": chosen.output / "work"}


def rows_of(chosen: argparse.Namespace) -> dict:
    """Return the sizes of a batch of calibration text."""
    return {"batch_size": chosen.batch_size, "seq_len": chosen.seq_len}


def calibration_file(chosen: argparse.Namespace, seed: int) -> Path:
    """Return the calibration file of a seed; it is made unless it is there."""
    request = calibrate.CalibrateRequest(
        model=chosen.model,
        text=chosen.calibration,
        num_batches=chosen.calibration_batches or chosen.num_batches,
        gradients=any(method_named(method).needs_gradients for method in chosen.methods),
        dtype="float32",
        seed=seed,
        output=chosen.output / f"calibration-{seed}.safetensors",
        **rows_of(chosen),
        **common(chosen),
    )
    return calibrate.run(request).calibration


def recover_into(
    target: Path, chosen: argparse.Namespace, pruned: Path, seed: int, fields: dict
) -> recover.RecoverResult:
    request = recover.RecoverRequest(
        compressed=str(pruned), text=chosen.calibration, seed=seed, output=target, **{**common(chosen), **fields}
    )
    return recover.run(request)


def measure(chosen: argparse.Namespace, model: Path | str | None) -> dict:
    """Return ``perplexity`` per token of the held-out text, in rows of 1,024 tokens, and ``recall`` if wanted.

    That is, for each kind of recall, how often the model prefers the right answer to seven others. Lengths, numbers
    of pairs and of sequences are those of `keyreduce eval --recall`, the haystacks held-out text.
    """
    batch_size = gcd(chosen.heldout_rows, 8)
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as temporary:
        request = evaluate.EvaluateRequest(
            model=model and str(model),
            text=chosen.heldout,
            num_batches=chosen.heldout_rows // batch_size,
            batch_size=batch_size,
            seq_len=1024,
            recall=("mqar", "needle") if chosen.recall else (),
            dtype="float32",
            output=Path(temporary) / "metrics.json",
            **common(chosen),
        )
        (found,) = evaluate.run(request).content["models"]
    recall = {kind: mean(cell["choice_accuracy"] for cell in cells) for kind, cells in found.get("recall", {}).items()}
    return {"perplexity": found["perplexity_per_token"], "recall": recall}


def slug(text: str) -> str:
    """Return a name for a file."""
    return re.sub(r"[^\w.-]", "_", text)


def summary_of(chosen: argparse.Namespace) -> dict:
    """Return what was measured in the output folder."""
    dense = read_json(chosen.output / "dense.json")
    found = [read_json(path) for path in sorted(chosen.output.glob("*/*.json"))]
    runs = [run for run in found if {"kind", "method"} <= run.keys() and "state_dtype" not in run]
    return {
        "model": find_model(chosen.model).name,
        "calibration_tokens": chosen.num_batches * chosen.batch_size * chosen.seq_len,
        "heldout_rows": chosen.heldout_rows,
        "sizes_for": chosen.sizes_for,
        "device": device_name(pick_device(chosen.device)),
        "torch": torch.__version__,
        "dense": {name: dense[name] for name in ("perplexity", "recall")},
        "recoveries": [{name: value for name, value in run.items() if name != "layers"} for run in runs],
    }


if __name__ == "__main__":
    main()

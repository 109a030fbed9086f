"""How much of the damage of pruning each repair takes back, on one model.

    python benchmarks/recovery_study.py --model PATH --calibration FILE --heldout FILE [--ratios 0.25 0.5 0.75]
        [--method rrqr] [--repairs none least-squares reconstruct reconstruct:scope=mixer,lr=0.001]
        [--num-batches 64] [--seeds 0 1 2] [--output figures.json]

A repair is a mode of `keyreduce recover`, after a colon the options that are not its defaults. Each seed takes another
order of the calibration text, for the choice of channels and for the repair. The increase of perplexity over the dense
model is printed as the mean over the seeds and half the distance between the extremes; figures are written after each
run, so that one that is cut off leaves what it has.
"""

import argparse
import json
import tempfile
import time
from itertools import product
from pathlib import Path

import torch

from keyreduce.calibration.run import Settings, calibrate
from keyreduce.calibration.statistics import Statistics
from keyreduce.checkpoint.find import find_model
from keyreduce.checkpoint.folder import open_folder
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.data.text import FileText
from keyreduce.devices import pick_device
from keyreduce.evaluation.perplexity import evaluate
from keyreduce.models.loading import load_model
from keyreduce.pruning.budget import Budget
from keyreduce.pruning.methods import method_named
from keyreduce.pruning.planning import make_plan
from keyreduce.pruning.prune import write_pruned
from keyreduce.recovery.overlap import refuse_overlap
from keyreduce.recovery.repair import make_steps, repair
from keyreduce.recovery.writing import write_repaired


def parse_repair(text: str) -> tuple[str, dict]:
    """Return mode and options of ``mode`` or ``mode:name=value,...``."""
    mode, _, rest = text.partition(":")
    kinds = {"steps": int, "lr": float, "scope": str}
    settings = dict(setting.split("=") for setting in rest.split(",") if setting)
    return mode, {name: kinds[name](value) for name, value in settings.items()}


def run_one(
    source: Checkpoint,
    statistics: Statistics,
    text: FileText,
    settings: Settings,
    *,
    method: str,
    ratio: str,
    repair_text: str,
    measure,
    device: torch.device,
) -> dict:
    """Prune, repair and measure; return perplexity and the seconds that the repair took."""
    chosen = method_named(method)
    budget = Budget.parse("key", ratio=ratio)
    numbers = budget.numbers(source.config, statistics, chosen, chosen.options)
    inputs = {"method": method, "target": ["key"], "ratio": ratio}
    plan = make_plan(source, chosen, numbers, seed=settings.seed, statistics=statistics, inputs=inputs)
    mode, options = parse_repair(repair_text)
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as folder:
        made, repaired = Path(folder) / "pruned", Path(folder) / "repaired"
        write_pruned(source, plan, made, dense=str(source.path))
        if mode == "none":
            return {"perplexity": measure(made), "seconds": 0.0}
        start = time.perf_counter()
        pruned = open_folder(made)
        found = repair(source, pruned, text, settings, steps=make_steps(mode, options), device=device)
        seconds = time.perf_counter() - start
        write_repaired(pruned, found, repaired, inputs={"mode": mode}, seconds=seconds)
        return {"perplexity": measure(repaired), "seconds": seconds, "layers": found.layers}


def print_table(runs: list[dict], dense: float, ratios: list[str], repairs: list[str]) -> None:
    """Print repair x ratio: how much higher perplexity is than that of the dense model, and the seconds of repair."""
    print(f"\nperplexity of the dense model {dense:.4f}; increase over it, seconds of the repair\n")
    print(f"| repair | {' | '.join(f'{float(ratio):.0%}' for ratio in ratios)} | s |")
    print(f"|---|{'---|' * len(ratios)}---|")
    for name in repairs:
        cells, seconds = [], []
        for ratio in ratios:
            found = [run for run in runs if (run["repair"], run["ratio"]) == (name, ratio)]
            rises = [100 * (run["perplexity"] / dense - 1) for run in found]
            seconds += [run["seconds"] for run in found]
            spread = f" ± {(max(rises) - min(rises)) / 2:.1f}" if len(rises) > 1 else ""
            cells.append(f"{sum(rises) / len(rises):+.1f}{spread}%" if rises else "")
        print(f"| {name} | {' | '.join(cells)} | {sum(seconds) / max(len(seconds), 1):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout", type=Path, nargs="+", required=True)
    parser.add_argument("--ratios", nargs="+", default=["0.25", "0.5", "0.75"])
    parser.add_argument("--repairs", nargs="+", default=["none", "least-squares", "reconstruct"])
    parser.add_argument("--method", default="rrqr")
    parser.add_argument("--num-batches", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    device = pick_device(arguments.device)
    source = open_folder(find_model(arguments.model))
    text, heldout = FileText(arguments.calibration), FileText(arguments.heldout)
    refuse_overlap(text, heldout)

    def measure(folder: Path) -> float:
        loaded = load_model(folder, device, torch.float32, gradients=True)
        return evaluate(loaded, heldout, seq_len=1024, batch_size=4, num_rows=None)[0].perplexity

    dense, runs = measure(source.path), []
    for seed in arguments.seeds:
        settings = Settings(arguments.num_batches, arguments.batch_size, arguments.seq_len, seed)
        # With gradients, fla's kernels leave the place to PyTorch's, which take float32 on any device.
        gradients = device.type != "cpu"
        statistics = calibrate(source, text, settings, device=device, dtype=torch.float32, gradients=gradients)
        for ratio, name in product(arguments.ratios, arguments.repairs):
            run = {"seed": seed, "ratio": ratio, "repair": name, "tokens": settings.tokens}
            run |= run_one(
                source,
                statistics,
                text,
                settings,
                method=arguments.method,
                ratio=ratio,
                repair_text=name,
                measure=measure,
                device=device,
            )
            runs.append(run)
            print(f"seed {seed}, {ratio}, {name}: {run['perplexity']:.4f}, {run['seconds']:.0f} s", flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps({"dense": dense, "runs": runs}, indent=1))
    print_table(runs, dense, arguments.ratios, arguments.repairs)


if __name__ == "__main__":
    main()

"""How much of the damage of pruning each repair takes back, on one model.

    python benchmarks/recovery_study.py [--model PATH] [--calibration FILE] [--heldout FILE] [--ratios 0.25 0.5 0.75]
        [--method rrqr] [--repairs none least-squares reconstruct reconstruct:scope=mixer,lr=0.001]
        [--num-batches 64] [--heldout-rows 64] [--seeds 0 1 2] [--recall] [--output figures.json]

A repair is a mode of `keyreduce recover`, after a colon the options that are not its defaults. Each seed takes another
order of the calibration text, for the choice of channels and for the repair. The increase of perplexity over the dense
model is printed as the mean over the seeds and half the distance between the extremes; with --recall, so is how often
the right answer is preferred to seven others. Figures are written after each run, so that one that is cut off leaves
what it has.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

from study import Study, add_arguments

from keyreduce.calibration.statistics import Statistics


def run_one(
    study: Study,
    statistics: Statistics,
    measure: Callable[[Path], dict],
    *,
    method: str,
    ratio: str,
    repair: str,
    seed: int,
) -> dict:
    """Prune, repair and measure; return what was measured, and the seconds that the repair took."""
    with tempfile.TemporaryDirectory(prefix="keyreduce-") as folder:
        made, repaired = Path(folder) / "pruned", Path(folder) / "repaired"
        pruned = study.prune(statistics, method, ratio, seed, made)
        if repair == "none":
            return {**measure(made), "seconds": 0.0}
        found, seconds = study.repair(pruned, repair, seed, repaired)
        return {**measure(repaired), "seconds": seconds, "layers": found.layers}


def print_tables(runs: list[dict], dense: dict, ratios: list[str], repairs: list[str]) -> None:
    """Print repair x ratio: how much higher perplexity is than that of the dense model, and recall."""

    def rise(run: dict) -> float:
        return 100 * (run["perplexity"] / dense["perplexity"] - 1)

    title = f"perplexity of the dense model {dense['perplexity']:.4f}; increase over it, seconds of the repair"
    print_table(title, runs, ratios, repairs, rise, "+.1f")
    for kind, right in dense.get("recall", {}).items():
        title = f"{kind}, right answers of eight; the dense model {100 * right:.1f}%"
        print_table(title, runs, ratios, repairs, lambda run, kind=kind: 100 * run["recall"][kind], ".1f")


def print_table(
    title: str, runs: list[dict], ratios: list[str], repairs: list[str], read: Callable[[dict], float], form: str
) -> None:
    """Print repair x ratio: the mean over seeds of what ``read`` finds in a run, in percent."""
    print(f"\n{title}\n")
    print(f"| repair | {' | '.join(f'{float(ratio):.0%}' for ratio in ratios)} | s |")
    print(f"|---|{'---|' * len(ratios)}---|")
    for name in repairs:
        cells, seconds = [], []
        for ratio in ratios:
            found = [run for run in runs if (run["repair"], run["ratio"]) == (name, ratio)]
            values = [read(run) for run in found]
            seconds += [run["seconds"] for run in found]
            spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):{form}}{spread}%" if values else "")
        print(f"| {name} | {' | '.join(cells)} | {sum(seconds) / max(len(seconds), 1):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, ratios=["0.25", "0.5", "0.75"], repairs=["none", "least-squares", "reconstruct"])
    parser.add_argument("--method", default="rrqr")
    parser.add_argument("--recall", action="store_true", help="measure it too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    study = Study(arguments)

    def measure(folder: Path) -> dict:
        measured = {"perplexity": study.measure(folder)}
        return measured | ({"recall": study.recall(folder)} if arguments.recall else {})

    dense, runs = measure(study.dense.path), []
    for seed in arguments.seeds:
        statistics = study.calibrate(seed)
        for ratio, name in product(arguments.ratios, arguments.repairs):
            run = {"seed": seed, "ratio": ratio, "repair": name, "tokens": study.settings(seed).tokens}
            run |= run_one(study, statistics, measure, method=arguments.method, ratio=ratio, repair=name, seed=seed)
            runs.append(run)
            print(f"seed {seed}, {ratio}, {name}: {run['perplexity']:.4f}, {run['seconds']:.0f} s", flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps({"dense": dense, "runs": runs}, indent=1))
    print_tables(runs, dense, arguments.ratios, arguments.repairs)


if __name__ == "__main__":
    main()

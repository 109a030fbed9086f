"""The tables of `scale_study.py`, from its JSON files."""

from collections.abc import Callable
from pathlib import Path

from keyreduce.outputs import read_json


def print_tables(folder: Path) -> None:
    """Print as Markdown what the models are, what each repair leaves, and what was left out."""
    found = [one for path in sorted(folder.glob("*.json")) if "training" in (one := read_json(path))]
    found.sort(key=lambda one: (one["config"]["model_type"], one["training"]["parameters"]))
    print("\n| model | parameters | trained on, tokens | tokens/s | minutes | perplexity |\n|" + "---|" * 6)
    for one in found:
        training = one["training"]
        perplexity = f"{one['dense']['perplexity']:.3f}" if "dense" in one else ""
        print(
            f"| {one['model']} | {training['parameters'] / 1e6:.1f}M | {training['tokens_seen'] / 1e6:.1f}M | "
            f"{training['tokens_per_second'] or 0:,} | {training['seconds'] / 60:.1f} | {perplexity} |"
        )
    found = [one for one in found if one.get("runs")]
    if found:
        print("\nIncrease of perplexity over the dense model\n")
        print_runs(found, lambda run, dense: f"{100 * (run['perplexity'] / dense['perplexity'] - 1):+.2f}%")
        for kind in found[0]["dense"]["recall"]:
            print(f"\n{kind}: right answers of eight, and the difference from the dense model in points\n")
            print_runs(found, lambda run, dense, kind=kind: told_recall(run["recall"][kind], dense["recall"][kind]))
    for path in sorted(folder.glob("*.json")):
        for name, why in read_json(path).get("left_out", {}).items():
            print(f"\nleft out: {path.stem}, {name}: {why}")


def print_runs(found: list[dict], tell: Callable[[dict, dict], str]) -> None:
    """Print a row for each cut and repair, with a column for each model."""
    print(f"| state | repair | tokens distilled | {' | '.join(one['model'] for one in found)} |")
    print("|" + "---|" * (3 + len(found)))
    rows = dict.fromkeys(key_of(run) for one in found for run in one["runs"])
    for row in sorted(rows, key=lambda row: (row[0], row[2])):
        cells = []
        for one in found:
            runs = [run for run in one["runs"] if key_of(run) == row]
            cells.append(tell(runs[0], one["dense"]) if runs else "")
        ratio, repair, tokens = row
        print(f"| -{100 * ratio:g}% | {repair} | {f'{tokens:,}' if tokens else ''} | {' | '.join(cells)} |")


def key_of(run: dict) -> tuple[float, str, int]:
    """Return the share of the state that was removed, the repair, and the tokens distilled after it."""
    return float(run["ratio"].removeprefix("state=")), run["repair"], run["tokens"]


def told_recall(right: float, dense: float) -> str:
    return f"{100 * right:.1f}% ({100 * (right - dense):+.1f})"

"""What benchmarks/vllm_serving.py makes of what it measured: right or wrong, one file of all steps, and tables."""

import statistics
from pathlib import Path
from typing import Any

from keyreduce.outputs import read_json, write_json


def judged(served: list[dict], references: list[dict]) -> dict:
    """Return how far an engine's log-probabilities are from float32, and how far bfloat16's rounding alone goes.

    ``regret`` is by how much the engine's greedy tokens are less likely than the likeliest, at most; it is what counts
    where a token differs.
    """
    found: dict[str, Any] = {}
    for part in ("prompt", "new"):
        off, rounding = [], []
        for one, told in zip(served, references, strict=True):
            first = len(one["prompt"]) - 1
            where = slice(0, first) if part == "prompt" else slice(first, None)
            exact = told["exact_U"][where]
            off += [abs(x - y) for x, y in zip(one["logprobs_U"][where], exact, strict=True)]
            rounding += [abs(x - y) for x, y in zip(told["rough_U"][where], exact, strict=True)]
        each = {"mean": statistics.mean(off), "most": max(off)}
        found[part] = each | {"rounding_mean": statistics.mean(rounding), "rounding_most": max(rounding)}
    same, regrets = 0, []
    for one, told in zip(served, references, strict=True):
        first = len(one["prompt"]) - 1
        same += sum(x == y for x, y in zip(one["new"], told["choice_U"][first:], strict=True))
        regrets += [x - y for x, y in zip(told["best_U"][first:], told["exact_U"][first:], strict=True)]
    found |= {"greedy_same": same, "greedy_of": len(regrets), "regret": max(regrets)}
    is_near = [found[part]["mean"] < 2 * found[part]["rounding_mean"] for part in ("prompt", "new")]
    return found | {"is_right": all(is_near)}


def put_together(folder: Path, kinds: tuple[str, ...]) -> dict:
    """Return what all steps of these kinds found, by their names, and write it into one file."""
    paths = sorted(path for path in folder.glob("*.json") if path.stem.split("-")[0] in kinds)
    found = {path.stem: read_json(path) for path in paths}
    if found:
        write_json(folder / "vllm_serving.json", found, overwrite=True)
    return found


def table(found: dict, dense: str) -> str:
    """Return Markdown: each engine at full load beside the dense one of the same run, and all else that was found."""
    lines = ["| run | engine | sequences | tokens/s | over dense | first token, ms |", "|---|---|---|---|---|---|"]
    for name, step in found.items():
        engines = step.get("engines", {})
        for engine, row in engines.items() if dense in engines else ():
            speed, most = speed_of(row), most_of(row)
            figures = f"{most:,} (x{most / most_of(engines[dense]):.2f}) | {speed:,.0f} "
            figures += f"| x{speed / speed_of(engines[dense]):.2f} | {row['first_token']['ms']:.1f}"
            lines.append(f"| {name} | {engine} | {figures} |")
    lines += ["", "| run | result |", "|---|---|"]
    lines += [f"| {name} | {told} |" for name, step in found.items() for told in _told(step)]
    return "\n".join(lines)


def _told(step: dict) -> list[str]:
    """Return in words what a step found, but for loads."""
    told = [f"failed: {step['error']}"] if "error" in step else []
    if "is_right" in step:
        parts = [f"{part} {step[part]['mean']:.4f} ({step[part]['rounding_mean']:.4f})" for part in ("prompt", "new")]
        told.append(
            f"{'right' if step['is_right'] else 'WRONG'}: off by {', '.join(parts)} (bfloat16 alone); "
            f"{step['greedy_same']} of {step['greedy_of']} greedy tokens the same"
        )
    for batch, one in step.get("batches", {}).items():
        told.append(f"{batch} sequences: " + ("not measured" if one["ms"] is None else f"{one['ms']:.2f} ms a step"))
    for row in step.get("rows", []):
        times = ", ".join(f"{way} {us:.1f} us" for way, us in row["us"].items())
        told.append(f"{row['head_k_dim']}x{row['head_v_dim']}, {row['tokens']:,} tokens: {times}")
    return told


def most_of(row: dict) -> int:
    """Return how many sequences ran at once."""
    return max(one["peak_running"] for one in row["rounds"])


def speed_of(row: dict) -> float:
    """Return the new tokens a second at full load: the median of the rounds."""
    speeds = [one["busy_tokens_per_s"] or one["tokens_per_s"] for one in row["rounds"]]
    return statistics.median(speeds)

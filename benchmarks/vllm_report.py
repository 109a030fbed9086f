"""What benchmarks/vllm_serving.py makes of what it measured: right or wrong, one file of all steps, and tables."""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from result_tables import table as markdown

from keyreduce.outputs import read_json, write_json

DENSE = "128x128"
_LARGE = (
    "48 layers with the mixers and the attention of Qwen3-Next-80B-A3B and feed-forward layers as wide as the experts "
    "that a token uses, 3.3B parameters where dense, dummy weights"
)


def judged(served: list[dict], references: list[dict]) -> dict:
    """Return how far an engine's log-probabilities are from float32, and how far bfloat16's rounding alone goes.

    ``regret`` is by how much the engine's greedy tokens are less likely than the likeliest, at most; it is what counts
    where a token differs.
    """
    found: dict[str, Any] = {}
    for part in ("prompt", "new"):
        off, rounding = [], []
        for one, reference in zip(served, references, strict=True):
            first = len(one["prompt"]) - 1
            where = slice(0, first) if part == "prompt" else slice(first, None)
            exact = reference["exact_U"][where]
            off += [abs(x - y) for x, y in zip(one["logprobs_U"][where], exact, strict=True)]
            rounding += [abs(x - y) for x, y in zip(reference["rough_U"][where], exact, strict=True)]
        each = {"mean": statistics.mean(off), "most": max(off)}
        found[part] = each | {"rounding_mean": statistics.mean(rounding), "rounding_most": max(rounding)}
    same, regrets = 0, []
    for one, reference in zip(served, references, strict=True):
        first = len(one["prompt"]) - 1
        same += sum(x == y for x, y in zip(one["new"], reference["choice_U"][first:], strict=True))
        regrets += [x - y for x, y in zip(reference["best_U"][first:], reference["exact_U"][first:], strict=True)]
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


def table(found: dict) -> str:
    """Return as Markdown all that was found, and what failed."""
    parts = [line for title, lines in serving_tables(found) for line in (f"### {title}", "", *lines, "")]
    parts += [f"- {name} failed: {step['error']}" for name, step in found.items() if "error" in step]
    return "\n".join(parts)


def serving_tables(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Yield a title, and the lines below it, for each kind of step that was measured."""
    makers = {
        "Right: a small model against transformers in float32": _right_lines,
        "At full load": _load_lines,
        "A step of decoding": _decode_lines,
        "The preparation of a prefill": _preparation_lines,
    }
    for title, make in makers.items():
        if lines := make(found):
            yield title, lines


def _steps(found: Mapping[str, Any], kind: str, measured: str) -> list[tuple[str, str, dict]]:
    """Return the engine, the dtype of the state and the result of each step of a kind, the largest state first."""
    names = [name for name, step in found.items() if name.startswith(f"{kind}-") and measured in step]
    steps = []
    for name in names:
        engine, _, state = name.removeprefix(f"{kind}-").rpartition("-")
        steps.append((engine, state, found[name]))
    return sorted(steps, key=lambda one: (one[1], *_size_order(one[0])))


def _size_order(engine: str) -> tuple[int, str]:
    """Return what engines are sorted by: channels of a state, falling."""
    key, value = engine.partition("-")[0].split("x")
    return -int(key) * int(value), engine


def _engine(name: str, facts: Mapping[str, Any]) -> str:
    """Return what the tables call an engine: its sizes, and what vLLM was given to run them."""
    size = name.removesuffix("-mended").replace("x", " x ")
    return size + {"no": "", "source": ", vLLM's source mended"}.get(facts["mend"], ", the plugin")


def _state(dtype: str) -> str:
    return "bfloat16" if dtype == "auto" else dtype


def _where(facts: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(sorted({f"vLLM {one['vllm']}, torch {one['torch']}, {one['device']}" for one in facts}))


def _right_lines(found: Mapping[str, Any]) -> list[str]:
    steps = _steps(found, "right", "is_right")
    rows = []
    for name, state, step in steps:
        off = [
            f"{step[part]['mean']:.4f} ({step[part]['rounding_mean']:.4f}), at most {step[part]['most']:.2f} "
            f"({step[part]['rounding_most']:.2f})"
            for part in ("prompt", "new")
        ]
        same = f"{step['greedy_same']} of {step['greedy_of']}"
        rows.append([_engine(name, step), _state(state), *off, same, "right" if step["is_right"] else "WRONG"])
    header = ["K x V", "state in", "prompt: off by", "new tokens: off by", "greedy tokens the same", "is"]
    return _section(
        "A Qwen3-Next of 15M parameters, 4 layers with the 16 key and 32 value heads of the real one, random weights "
        f"in bfloat16, cut by keyreduce; {_where(step for *_, step in steps)}, with CUDA graphs. Log-probabilities of "
        "prompts of up to 400 tokens and of 24 new ones each, in nats, means; in brackets what transformers in "
        "bfloat16 is off by. Right means: in the mean off by less than twice that.",
        header,
        rows,
    )


def _load_lines(found: Mapping[str, Any]) -> list[str]:
    loads = _steps(found, "load", "engines")
    rows, facts, pools = [], [], set()
    for _, state, step in loads:
        dense = step["engines"].get(DENSE)
        for name, row in step["engines"].items():
            facts.append(row)
            pools.add(f"{step['pool_gib']:g}")
            over = [f" (x{of(row) / of(dense):.2f})" if dense else "" for of in (most_of, speed_of)]
            first, speeds = row["first_token"], _speeds(row)
            rows.append([
                _state(state), _engine(name, row), f"{row['page_bytes'] / 1024:,.0f}", f"{most_of(row):,}{over[0]}",
                f"{speed_of(row):,.0f}{over[1]}", f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                f"{first['ms']:.0f} ({first['least_ms']:.0f})",
            ])  # fmt: skip
    header = ["state in", "K x V", "page, KiB", "sequences at once", "new tokens/s", "in rounds", "first token, ms"]
    return _section(
        f"{_LARGE}; {_where(facts)}. {' and '.join(sorted(pools))} GiB for states, keys and values; sequences of 256 "
        "and 256 new tokens, always more waiting than run, dense and cut in turns: medians of rounds, in brackets over "
        "the dense model of the same run. The first token is that of a prompt of 2,048 alone, the fastest in brackets.",
        header,
        rows,
    )


def _decode_lines(found: Mapping[str, Any]) -> list[str]:
    steps = _steps(found, "decode", "batches")
    batches = sorted({batch for *_, step in steps for batch in step["batches"]}, key=int)
    dense = {state: step["batches"] for name, state, step in steps if name == DENSE}
    rows = []
    for name, state, step in steps:
        cells = []
        for batch in batches:
            one, whole = (of.get(batch, {}) for of in (step["batches"], dense.get(state, {})))
            faster = f" (x{whole['ms'] / one['ms']:.2f})" if one.get("ms") and whole.get("ms") else ""
            cells.append(f"{one['ms']:.2f}{faster}, least {one['least_ms']:.2f}" if one.get("ms") else "")
        rows.append([_state(state), _engine(name, step), *cells])
    header = ["state in", "K x V", *(f"{int(batch):,} sequences, ms" for batch in batches)]
    return _section(
        f"{_LARGE}; {_where(step for *_, step in steps)}. The time of a step in which each sequence has one token, "
        "that of the host included: medians, in brackets how many times as fast as dense, and the fastest step. "
        "Engines that fit into the GPU together work in turns; not all were in one run with the dense one. Where a "
        "cell is empty, not as many sequences fit.",
        header,
        rows,
    )


def _preparation_lines(found: Mapping[str, Any]) -> list[str]:
    measured = found.get("preparation", {}).get("rows", [])
    rows = []
    for row in measured:
        us = row["us"]
        others = [f"{us[way]:.1f} (x{us[way] / us['ours']:.2f})" if way in us else "" for way in ("vllm", "mended")]
        rows.append([f"{row['head_k_dim']} x {row['head_v_dim']}", f"{row['tokens']:,}", f"{us['ours']:.1f}", *others])
    devices = ", ".join(sorted({row["device"] for row in measured}))
    return _section(
        f"The kernel alone, 16 key and 32 value heads, bfloat16, no model; {devices}. Medians in microseconds; in "
        "brackets how many times as long as the plugin's. vLLM's own does not compile for 64 x 128.",
        ["K x V", "tokens", "the plugin's", "vLLM's", "vLLM's, mended"],
        rows,
    )


def _section(words: str, header: list[str], rows: list[list[str]]) -> list[str]:
    return [words, "", *markdown(header, rows)] if rows else []


def most_of(row: Mapping[str, Any]) -> int:
    """Return how many sequences ran at once."""
    return max(one["peak_running"] for one in row["rounds"])


def speed_of(row: Mapping[str, Any]) -> float:
    """Return the new tokens a second at full load: the median of the rounds."""
    return statistics.median(_speeds(row))


def _speeds(row: Mapping[str, Any]) -> list[float]:
    return [one["busy_tokens_per_s"] or one["tokens_per_s"] for one in row["rounds"]]

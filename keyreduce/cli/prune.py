"""``keyreduce prune``: statistics and a checkpoint to a smaller checkpoint."""

from pathlib import Path

from keyreduce.api import prune
from keyreduce.cli.console import Console, mebibytes
from keyreduce.workspace import Workspace

_SIZES = {
    "key_heads": "key heads",
    "head_k_dim": "key channels a head",
    "head_v_dim": "value channels a head",
    "state_bytes_per_sequence": "state per sequence, float32",
    "mixer_parameters": "mixer parameters",
    "model_parameters": "model parameters",
}
_SHOWN = 12
"""How many candidates are printed; the file has all."""
_ALWAYS = ("state_bytes_per_sequence", "mixer_parameters", "model_parameters")


def show(request: prune.PruneRequest, console: Console) -> None:
    """Prune, and print what became smaller, and where such sizes run."""
    result = prune.run(request, console)
    if result.state_budget:
        _print_candidates(result.state_budget, console)
        report = Workspace(request.work).state_budget
        console.say(f"wrote {report} and {report.with_suffix('.png').name}")
    if isinstance(result, prune.PruneResult) and result.made:
        _print_cut(Path(request.model or result.dense).name, result, console)
    console.finish(result)


def _print_candidates(found: dict, console: Console) -> None:
    """Print what was considered for a budget, the choice first."""
    rows = []
    for row in found["candidates"][:_SHOWN]:
        increase = ""
        if "perplexity_increase" in row:
            increase = f"{100 * row['perplexity_increase']:+.2f} ± {100 * row['perplexity_error']:.2f}%"
        sizes = f"{row['key_heads']} x {row['head_k_dim']} x {row['head_v_dim']}"
        step = f"{1e6 * row['decode_seconds']:,.0f}" if "decode_seconds" in row else ""
        state = f"{row['state_bytes'] / found['dense_state_bytes']:.1%}"
        rows.append((sizes, row["state_dtype"], state, f"{row['predicted']:.3f}", increase, step))
    after = f", after {found['measured_after']}" if found.get("measured_after") else ""
    measured = f"; perplexity{after}, over dense" if found["search"] == "measured" else ""
    title = f"{len(found['candidates'])} candidates, the choice first{measured}"
    header = ("heads x K x V", "state", "left", "predicted", "perplexity", "decode, µs")
    console.table(title, header, rows)


def _print_cut(model: str, result: prune.PruneResult, console: Console) -> None:
    rows = []
    changes = any(before != after for before, after in (getattr(result, name) for name in _SIZES))
    for name, label in _SIZES.items():
        before, after = getattr(result, name)
        if name not in _ALWAYS and changes and before == after:
            continue  # what stayed is not news
        smaller = 1 - _mean(after) / _mean(before)
        rows.append((label, _written(name, before), _written(name, after), f"{smaller:.1%}"))
    console.table(f"{model}, pruned with {result.method}", ("", "before", "after", "smaller by"), rows)
    console.say(result.smaller)
    if result.suited_engines:
        console.say(f"its sizes suit: {'; '.join(result.suited_engines)}")
    if result.unsuited_engines:
        console.say(f"not: {'; '.join(result.unsuited_engines)}")
    if result.generation:
        console.say(result.generation)
    if result.repair:
        mode, tokens, seconds = (result.repair[name] for name in ("mode", "tokens", "seconds"))
        console.say(f"recovered: {mode}, on {tokens:,} tokens, in {seconds:.0f} s")
    console.say(f"wrote {result.pruned}")


def _mean(size: int | list[int]) -> float:
    return sum(size) / len(size) if isinstance(size, list) else size


def _written(name: str, size: int | list[int]) -> str:
    """A size as text; the smallest and largest, where layers differ."""
    if isinstance(size, list):
        return f"{min(size)} to {max(size)}"
    if name == "state_bytes_per_sequence":
        return mebibytes(size)
    return f"{size:,}" if name in _ALWAYS else f"{size}"

"""``keyreduce inspect``: what a model's state costs, what each cut would save, and how engines would serve it."""

from typing import Any

from keyreduce.api import inspect
from keyreduce.cli.console import Console, mebibytes, megabytes

_LIBRARIES = ("fla", "transformers")  # which run nearly every size
_COLUMNS = {"vllm": "vLLM", "sglang": "SGLang"}


def show(request: inspect.InspectRequest, console: Console) -> None:
    """Read config and headers, and print what follows from them."""
    result = inspect.run(request, console)
    _describe(result, console)
    _list_engines(result, console)
    if result.capacity:
        _list_capacity(result, console)
    _list_cuts(result, console)
    for note in result.notes:
        console.note(note)
    _list_commands(result, console)
    console.finish(result)


def _describe(result: inspect.InspectResult, console: Console) -> None:
    console.say(
        f"{result.model} ({result.model_type}): {result.mixer_layers} layers with a delta-rule state and "
        f"{result.softmax_layers} of softmax attention; {result.parameters:,} parameters ({result.mixer_parameters:,} "
        f"in the mixers), {megabytes(result.file_bytes)}"
    )
    if result.pruned_from:
        console.say(f"it was pruned by keyreduce from {result.pruned_from}")
    console.say(
        f"a mixer has {_text(result.key_heads)} key heads and {_text(result.value_heads)} value heads of "
        f"{_text(result.head_k_dim)} x {_text(result.head_v_dim)} key and value channels"
    )
    parts = {
        f"recurrent state, {result.state_dtype}": result.state_bytes,
        "convolution state, 16 bits": result.convolution_bytes,
        f"keys and values of {result.tokens:,} tokens, 16 bits": result.softmax_bytes,
    }
    rows = [[name, mebibytes(size)] for name, size in parts.items() if size]
    console.table("", ("a sequence holds", "memory"), [*rows, ["together", mebibytes(sum(parts.values()))]])


def _list_engines(result: inspect.InspectResult, console: Console) -> None:
    rows = []
    alone = any(engine["name"] == "vllm" and engine["runs"] for engine in result.engines)
    for engine in result.engines:
        if engine["name"] == "vllm-plugin" and alone:
            continue
        first = engine["evidence"][0]
        facts = [first[name] for name in ("version", "on", "when")]
        known = f"{first['how']}: {', '.join(fact for fact in facts if fact)}"
        knows = {None: "-", "": "no"}.get(engine["knows"], f"since {engine['knows']}")
        rows.append([engine["name"], "yes" if engine["runs"] else f"no: it wants {engine['demand']}", knows, known])
    console.table("", ("engine", "runs these sizes", "has the model", "known by"), rows)


def _list_capacity(result: inspect.InspectResult, console: Console) -> None:
    rows = []
    for one in result.capacity:
        figures = [one["sequences"], one["by_default"], one["with_prefix_caching"]]
        memory = f"{one['cache_bytes'] / 2**30:,.1f} GiB"
        rows.append([_COLUMNS[one["engine"]], one["state_dtype"], memory, *(f"{number:,}" for number in figures)])
    header = ("sequences that fit", "state in", "caches of a GPU", "with the command", "as it is", "prefix caching")
    console.table(f"{result.tokens:,} tokens a sequence", header, rows)


def _list_cuts(result: inspect.InspectResult, console: Console) -> None:
    now = {one["engine"]: one["sequences"] for one in result.capacity}
    rows = []
    for cut in result.cuts:
        row = [f"{cut['head_k_dim']} x {cut['head_v_dim']}", f"{cut['state_share'] - 1:+.0%}"]
        row += [mebibytes(cut["saved_bytes"]), f"{-cut['saved_parameters'] / result.parameters:+.1%}"]
        for one in cut["capacity"]:
            more = f" (x{one['sequences'] / now[one['engine']]:.2f})" if now[one["engine"]] else ""
            row.append(f"{one['sequences']:,}{more}" if one["runs"] or one["needs_plugin"] else "-")
        hidden = {*_LIBRARIES, "vllm-plugin"} if "vllm" in cut["engines"] else set(_LIBRARIES)
        rows.append([*row, " ".join(engine for engine in cut["engines"] if engine not in hidden)])
    if rows:
        header = ["cut to", "state", "saved a sequence", "model"]
        console.table("", (*header, *(_COLUMNS[engine] for engine in now), "served by"), rows)


def _list_commands(result: inspect.InspectResult, console: Console) -> None:
    """Print what to paste: the model as it is, and the cut nearest to half the state that an engine runs by itself."""
    for one in result.capacity:
        if not (one["runs"] or one["needs_plugin"]) or not one["sequences"]:
            continue
        console.say(f"{_COLUMNS[one['engine']]}, as it is{', with the plugin' if one['needs_plugin'] else ''}:")
        console.say(f"  {one['command']}")
        cuts = [(cut, found) for cut in result.cuts for found in cut["capacity"] if found["engine"] == one["engine"]]
        running = [(cut, found) for cut, found in cuts if found["runs"]]
        if running:
            cut, found = min(running, key=lambda pair: abs(pair[0]["state_share"] - 0.5))
            console.say(f"{_COLUMNS[one['engine']]}, with about half the state:")
            console.say(f"  keyreduce prune --model {result.model} {cut['prune']} --output PRUNED")
            console.say(f"  {found['command']}")


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

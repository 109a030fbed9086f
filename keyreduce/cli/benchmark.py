"""``keyreduce benchmark``: models side by side, in time and memory."""

from collections.abc import Callable, Iterator, Sequence

from keyreduce.api import benchmark
from keyreduce.cli.console import Console, mebibytes, scaled

_KINDS = {"mixer": "one mixer layer", "forward": "the whole model", "train_step": "a step of training"}
_SCOPES = {"model": "the whole model", "mixer": "one mixer layer", "operator": "the delta-rule operator alone"}
_CELLS: dict[str, Callable[[dict], str]] = {
    "head_k_dim": lambda entry: str(entry["head_k_dim"]),
    "head_v_dim": lambda entry: str(entry["head_v_dim"]),
    "tokens/s": lambda entry: scaled(entry["tokens_per_second"]),
    "latency, ms": lambda entry: _spread(entry["latency_seconds"], 1e3),
    "a step, us": lambda entry: _spread(entry["latency_seconds"], 1e6),
    "speedup": lambda entry: _spread(entry["speedup"]) if "speedup" in entry else "",
    "peak memory": lambda entry: mebibytes(entry["peak_memory_bytes"]),
    "state per sequence": lambda entry: mebibytes(entry["state_bytes_per_sequence"]),
    "times floor": lambda entry: _times(entry["times_floor"]),
    "TFLOP/s": lambda entry: _share(entry["teraflops"], entry["compute_share"]),
    "GB/s": lambda entry: _share(entry["gigabytes_per_second"], entry["bandwidth_share"]),
}
_SIZES = ("head_k_dim", "head_v_dim")
_SIDE_BY_SIDE = (*_SIZES, "tokens/s", "latency, ms", "peak memory", "state per sequence", "TFLOP/s", "GB/s")
_LISTED = ("latency, ms", "speedup", "tokens/s", "peak memory", "state per sequence", "TFLOP/s")
_STEP = ("a step, us", "speedup", "tokens/s", "times floor", "GB/s")


def show(request: benchmark.BenchmarkRequest, console: Console) -> None:
    """Time the models, and print what was measured."""
    result = benchmark.run(request, console)
    for entry in result.content["models"]:
        if not entry["layers_alike"]:
            console.say(
                f"{entry['label']}: its layers differ in size; where one layer is timed, that is layer {entry['layer']}"
            )
    print_tables(console, result.content)
    for path in filter(None, (result.output, request.plot)):
        console.say(f"wrote {path}")
    console.finish(result)


def print_tables(console: Console, report: dict) -> None:
    """Print a table for each measurement of a report: two models side by side, more of them one below the other."""
    settings, models = report["settings"], {entry["label"]: entry for entry in report["models"]}
    run = f"{settings['dtype']}, {settings['device']}; {settings['rounds']} rounds in turns, median (95% interval)"
    for kind, name in _KINDS.items():
        for group in _groups(report.get(kind, []), len(models)):
            console.say(f"{name}, {group[0]['batch_size']} x {group[0]['seq_len']} tokens, {run}")
            full = [models[entry["label"]] | entry for entry in group]
            if len(models) <= 2:
                _side_by_side(console, full)
            else:
                _listed(console, _LISTED, [(entry["label"], entry) for entry in full])
    if report.get("per_token"):
        console.say(f"one mixer layer, microseconds a token in a prefill, and a decoding step, {run}")
        _per_token(console, report["per_token"])
    for group in _groups(report.get("decode", []), len(models)):
        console.say(f"decoding, {_SCOPES[group[0]['scope']]}, {group[0]['batch_size']} sequences at once, {run}")
        _decoded(console, group, settings["device_type"])
    if report.get("largest_batch"):
        _largest(console, report["largest_batch"])
    bandwidth, compute = (report["ceilings"][name] for name in ("bytes_per_second", "flops_per_second"))
    speed, rate = f"{bandwidth / 1e9:.3g} GB/s", f"{compute / 1e12:.3g} TFLOP/s"
    console.say(f"100% are {speed}, of a copy, and {rate}, of a matrix product, both measured here")
    spent = f"took {report['warmup_seconds']:.3g} s, in none of these figures"
    console.say(f"warming up, in which kernels are compiled and tuned, {spent}")


def _groups(entries: Sequence[dict], size: int) -> Iterator[Sequence[dict]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def _side_by_side(console: Console, entries: Sequence[dict]) -> None:
    dense, *pruned = entries
    header = [entry["label"] for entry in entries]
    # A size that is the same in all of them says nothing here, but for the one that is most often cut.
    same = {name for name in _SIZES[1:] if len({entry[name] for entry in entries}) == 1}
    rows = {name: [_CELLS[name](entry) for entry in entries] for name in _SIDE_BY_SIDE if name not in same}
    for entry in pruned:
        header.append(f"{dense['label']} / {entry['label']}")
        ratios = {name: _times(dense[name] / entry[name]) for name in _SIZES}
        ratios |= {"latency, ms": _spread(entry["speedup"]), "state per sequence": _times(entry["state_ratio"])}
        ratios["peak memory"] = _times(entry["memory_ratio"]) if "memory_ratio" in entry else ""
        for name, row in rows.items():
            row.append(ratios.get(name, ""))
    console.table("", ("", *header), [(name, *row) for name, row in rows.items()])


def _listed(console: Console, names: Sequence[str], entries: Sequence[tuple[str, dict]]) -> None:
    rows = [(label, *(_CELLS[name](entry) for name in names)) for label, entry in entries]
    console.table("", ("", *(name.removesuffix(" per sequence") for name in names)), rows)


def _per_token(console: Console, entries: Sequence[dict]) -> None:
    header = ["", "state", *(f"prefill, {one['batch_size']} x {one['seq_len']}" for one in entries[0]["prefill"])]
    header += [f"decode step, {one['batch_size']}" for one in entries[0]["decode"]]
    rows = []
    for entry in entries:
        times = [one["seconds_per_token"] for one in entry["prefill"]]
        times += [one["seconds_per_step"] for one in entry["decode"]]
        state = mebibytes(entry["state_bytes_per_sequence"])
        rows.append((entry["label"], state, *(_spread(time, 1e6) for time in times)))
    console.table("", header, rows)


def _decoded(console: Console, entries: Sequence[dict], device_type: str) -> None:
    for way, launch in (("eager", "launched by Python:"), ("graph", "as a CUDA graph:")):
        if entries[0][way] is not None:
            console.say(launch)
            _listed(console, _STEP, [(entry["label"], entry[way]) for entry in entries])
        elif device_type == "cuda":
            console.note(f"launched by Python alone, not as a CUDA graph: {entries[0]['graph_note']}")


def _largest(console: Console, entries: Sequence[dict]) -> None:
    console.say("decoding, the whole model, the largest batch that fits")
    rows = []
    for entry in entries:
        speed = "" if entry["tokens_per_second"] is None else scaled(entry["tokens_per_second"])
        rows.append((entry["label"], str(entry["batch_size"]), entry["ended_by"], speed))
    console.table("", ("", "sequences", "ended by", "tokens/s"), rows)


def _spread(value: dict, factor: float = 1) -> str:
    low, median, high = (_digits(factor * value[name]) for name in ("low", "median", "high"))
    return f"{median} ({low}–{high})"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _share(amount: float, share: float) -> str:
    return f"{_digits(amount)} ({share:.0%})"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"

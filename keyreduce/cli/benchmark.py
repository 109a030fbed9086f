"""``keyreduce benchmark``: models side by side, in time and memory."""

from collections.abc import Iterator, Sequence

from keyreduce.api import benchmark
from keyreduce.cli.console import Console, mebibytes, scaled

_KINDS = {"mixer": "one mixer layer", "forward": "the whole model", "train_step": "a step of training"}
_SCOPES = {"model": "the whole model", "mixer": "one mixer layer", "operator": "the delta-rule operator alone"}


def show(request: benchmark.BenchmarkRequest, console: Console) -> None:
    """Time the models, and print what was measured."""
    result = benchmark.run(request, console)
    for entry in result.report["models"]:
        if not entry["layers_alike"]:
            console.say(
                f"{entry['label']}: its layers differ in size; where one layer is timed, that is layer {entry['layer']}"
            )
    print_tables(console, result.report)
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
            (_side_by_side if len(models) <= 2 else _listed)(console, full)
    for group in _groups(report.get("decode", []), len(models)):
        console.say(f"decoding, {_SCOPES[group[0]['scope']]}, {group[0]['batch_size']} sequences at once, {run}")
        _decoded(console, group, settings["device_type"])
    if report.get("largest_batch"):
        _largest(console, report["largest_batch"])
    roofline = report["ceilings"]
    console.say(
        f"100% are {roofline['bytes_per_second'] / 1e9:.3g} GB/s, of a copy, "
        f"and {roofline['flops_per_second'] / 1e12:.3g} TFLOP/s, of a matrix product, both measured here"
    )
    console.say(
        f"warming up, in which kernels are compiled and tuned, took {report['warmup_seconds']:.3g} s, "
        "in none of these figures"
    )


def _groups(entries: Sequence[dict], size: int) -> Iterator[Sequence[dict]]:
    for start in range(0, len(entries), size):
        yield entries[start : start + size]


def _side_by_side(console: Console, entries: Sequence[dict]) -> None:
    dense, *pruned = entries
    header, columns = [""], []
    rows = ["head_k_dim", "tokens/s", "latency, ms", "peak memory", "state per sequence", "TFLOP/s", "GB/s"]
    for entry in entries:
        header.append(entry["label"])
        columns.append(
            [
                str(entry["head_k_dim"]),
                scaled(entry["tokens_per_second"]),
                _spread(entry["latency_seconds"], 1e3),
                mebibytes(entry["peak_memory_bytes"]),
                mebibytes(entry["state_bytes_per_sequence"]),
                _share(entry["teraflops"], entry["compute_share"]),
                _share(entry["gigabytes_per_second"], entry["bandwidth_share"]),
            ]
        )
    for entry in pruned:
        header.append(f"{dense['label']} / {entry['label']}")
        keys = _times(dense["head_k_dim"] / entry["head_k_dim"])
        memory = _times(entry["memory_ratio"]) if "memory_ratio" in entry else ""
        columns.append([keys, "", _spread(entry["speedup"]), memory, _times(entry["state_ratio"]), "", ""])
    console.table("", header, [(name, *cells) for name, *cells in zip(rows, *columns, strict=True)])


def _listed(console: Console, entries: Sequence[dict]) -> None:
    header = ["", "latency, ms", "speedup", "tokens/s", "peak memory", "state", "TFLOP/s"]
    rows = [
        [
            entry["label"],
            _spread(entry["latency_seconds"], 1e3),
            _speedup(entry),
            scaled(entry["tokens_per_second"]),
            mebibytes(entry["peak_memory_bytes"]),
            mebibytes(entry["state_bytes_per_sequence"]),
            _share(entry["teraflops"], entry["compute_share"]),
        ]
        for entry in entries
    ]
    console.table("", header, rows)


def _decoded(console: Console, entries: Sequence[dict], device_type: str) -> None:
    for way, launch in (("eager", "launched by Python:"), ("graph", "as a CUDA graph:")):
        if entries[0][way] is not None:
            console.say(launch)
            _steps(console, [(entry["label"], entry[way]) for entry in entries])
        elif device_type == "cuda":
            console.note(f"launched by Python alone, not as a CUDA graph: {entries[0]['graph_note']}")


def _steps(console: Console, entries: Sequence[tuple[str, dict]]) -> None:
    rows = [
        [
            label,
            _spread(entry["latency_seconds"], 1e6),
            _speedup(entry),
            scaled(entry["tokens_per_second"]),
            _times(entry["times_floor"]),
            _share(entry["gigabytes_per_second"], entry["bandwidth_share"]),
        ]
        for label, entry in entries
    ]
    console.table("", ["", "a step, us", "speedup", "tokens/s", "times floor", "GB/s"], rows)


def _largest(console: Console, entries: Sequence[dict]) -> None:
    console.say("decoding, the whole model, the largest batch that fits")
    rows = []
    for entry in entries:
        speed = entry["tokens_per_second"]
        cells = [str(entry["batch_size"]), entry["ended_by"], "" if speed is None else scaled(speed)]
        rows.append([entry["label"], *cells])
    console.table("", ["", "sequences", "ended by", "tokens/s"], rows)


def _speedup(entry: dict) -> str:
    return _spread(entry["speedup"]) if "speedup" in entry else ""


def _spread(value: dict, factor: float = 1) -> str:
    low, median, high = (_digits(factor * value[name]) for name in ("low", "median", "high"))
    return f"{median} ({low}–{high})"


def _digits(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _share(amount: float, share: float) -> str:
    return f"{_digits(amount)} ({share:.0%})"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"

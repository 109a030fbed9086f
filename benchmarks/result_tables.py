"""The tables of docs/results.md as Markdown, one function for each kind of JSON; the scripts print some of them too.

None needs torch: they are made wherever the JSON is.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, stdev

UNREPAIRED = ("exact", "none")
"""What studies call a cut without a repair: not even corrected, and corrected."""
REPAIR_WORDS = {"exact": "uncorrected", "none": "no repair", "least-squares": "least squares"}
"""What tables and pictures call a repair, if not by its name."""
GRID_KINDS = ("exact", "corrected", "least-squares")
ENGINES = {"fla": "fla", "vllm": "vLLM", "vllm-plugin": "vLLM with the plugin", "sglang": "SGLang"}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def grid_table(found: Mapping) -> Iterator[str]:
    """Yield what benchmarks/state_budget.py measured: the rank correlations, and the cuts."""
    from scipy.stats import spearmanr

    cuts = sorted(found["cuts"], key=lambda cut: -cut["state"])
    kinds = [kind for kind in GRID_KINDS if kind in cuts[0]]
    yield f"{found['model']}: dense perplexity {found['dense_perplexity']:.3f} on {found['predictions']:,} held-out"
    yield f"predictions, {found['calibration_tokens']:,} calibration tokens, {len(cuts)} cuts, {found['device']}"
    yield ""
    for kind in kinds:
        predicted = [cut["predicted_recovered" if kind == "least-squares" else "predicted"] for cut in cuts]
        rank = spearmanr(predicted, [cut[kind] for cut in cuts]).statistic
        near = [place for place, cut in enumerate(cuts) if 0.35 <= cut["state"] <= 0.7]
        close = spearmanr([predicted[place] for place in near], [cuts[place][kind] for place in near]).statistic
        yield f"- {kind}: Spearman {rank:.3f}; of the {len(near)} cuts that leave 35% to 70% of the state {close:.3f}"
    yield ""
    rows = []
    for cut in cuts:
        sizes = f"{cut['key_heads']}, {cut['head_k_dim']} x {cut['head_v_dim']}"
        shares = [f"{100 * cut[kind]:+.1f}%" for kind in kinds]
        rows.append([sizes, f"{100 * cut['state']:.0f}%", f"{cut['predicted']:.3f}", *shares])
    yield from table(["heads, K x V", "state", "predicted", *kinds], rows)


def study_table(found: Mapping) -> Iterator[str]:
    """Yield what benchmarks/budget_study.py measured: means over the seeds, and their standard deviation."""
    base = found["dense"]
    first = f", of the first {found['first_rows']} in brackets" if found["first_rows"] else ""
    of = "rows" if found.get("every", 1) == 1 else f"rows, every {found['every']}th"
    yield f"{found['model']}: perplexity {base['perplexity']:.3f} of {found['heldout_rows']} {of}{first};"
    yield f"{found['calibration_tokens']:,} calibration tokens, {found['device']}"
    yield ""
    groups: dict[tuple[str, ...], list[Mapping]] = {("nothing", "", "", "float32"): [base]}
    for run in found["runs"]:
        heads, key, value = run["sizes"]
        repair = REPAIR_WORDS.get(run["repair"], run["repair"])
        groups.setdefault((run["cut"], f"{heads}, {key} x {value}", repair, run["state_dtype"]), []).append(run)
    # What one draw of text chose stands beside what another one did.
    places = {part: list(dict.fromkeys(group[part] for group in groups)) for part in (0, 2, 3)}
    rows = []
    for group in sorted(groups, key=lambda one: [order.index(one[part]) for part, order in places.items()]):
        runs = groups[group]
        loss = spread([100 * (run["perplexity"] / base["perplexity"] - 1) for run in runs], digits=2)
        if found["first_rows"]:
            whole = [100 * (run["perplexity_first"] / base["perplexity_first"] - 1) for run in runs]
            loss += f" ({spread(whole, digits=2)})"
        recall = [spread([100 * run["recall"][kind] for run in runs if "recall" in run], "") for kind in base["recall"]]
        rows.append([*group, loss, *recall, f"{mean(run.get('seconds', 0) for run in runs):,.0f}"])
    yield from table(["cut", "heads, K x V", "repair", "state in", "perplexity", *base["recall"], "s"], rows)


def spread(percents: Sequence[float], sign: str = "+", digits: int = 1) -> str:
    """Return a mean in percent, with the standard deviation where there are several."""
    more = f" ± {stdev(percents):.{digits}f}" if len(percents) > 1 else ""
    return f"{mean(percents):{sign}.{digits}f}{more}%" if percents else ""


def precision_table(report: Mapping) -> Iterator[str]:
    """Yield what benchmarks/state_precision.py measured: costs, drift along the sequence, and heads."""
    states = report["states"]
    bins = [f"{part['start']:,} to {part['end'] - 1:,}" for part in states[0]["drift"]]
    size = f"{report['parameters'] / 1e6:.0f}M parameters, {report['rows']} rows of {report['seq_len']:,} tokens"
    yield f"`{report['command']}` ({report['model']}, {size}; {report['seconds']} s)"
    yield ""
    rows = []
    for state in states:
        errors = [head["errors"].get(state["dtype"]) for head in report.get("heads", [])]
        average = f"{sum(errors) / len(errors):.2%}" if errors and None not in errors else ""
        cost = [f"{state['perplexity_per_token']:.4f}", f"{state['perplexity_increase']:+.2%}"]
        rows.append([state["dtype"], f"{state['bytes_per_sequence'] / 1024:,.0f}", *cost, average])
    yield from table(["state in", "KiB a sequence", "perplexity", "over float32", "mean error of a head"], rows)
    yield ""
    rows = [[state["dtype"], *(f"{part['difference']:+.4f}" for part in state["drift"])] for state in states[1:]]
    yield from table(["nats, over float32", *bins], rows)
    known = (f"{name} {value:+.2f}" for name, value in report["memory_correlation"].items() if value is not None)
    yield from ("", f"Correlation of a head's error with its memory: {', '.join(known)}", "")
    choice = next((state["choice"] for state in states if "choice" in state), None)
    if choice:
        yield from (f"Choice: {json.dumps(choice)}", "")


def search_table(rows: Sequence[Mapping]) -> Iterator[str]:
    """Yield the fastest tiling of each size in a search of the decode kernel, beside a copy of its state and fla's."""
    finals: dict[tuple[str, int], dict[str, Mapping]] = {}
    for row in rows:
        finals.setdefault((row["size"], row["B"]), {})[row["name"]] = row
    lines = []
    for (size, B), found in finals.items():
        ours = next(row for name, row in found.items() if name.startswith("("))  # the best comes first
        cells = [size, str(B), f"{ours['us']:.1f}", f"{ours['share']:.0%}", f"{found['copy']['us'] / ours['us']:.0%}"]
        lines.append([*cells, f"{found['fla']['us']:.1f}", f"{ours['speedup']:.2f}"])
    yield from table(["size", "B", "µs", "of the bandwidth", "of its copy", "fla: µs", "faster"], lines)


def formats_table(rows: Sequence[Mapping]) -> Iterator[str]:
    """Yield the decode kernel's times by format of the state, beside a copy of its state and fla's float32 kernel."""
    lines = []
    for row in rows:
        cells = [row["case"], row["state_dtype"], f"{row['K']} x {row['V']}", str(row["B"]), f"{row['us']:.1f}"]
        lines.append([*cells, f"{row['of_copy']:.0%}", f"{row['fla_us']:.1f}", f"{row['speedup']:.2f}"])
    yield from table(["rule", "state in", "K x V", "B", "µs", "of its copy", "fla: µs", "faster"], lines)


def backend_table(found: Mapping) -> Iterator[str]:
    """Yield the times of the PyTorch backend's rule on a CPU, fla's naive functions, and one matrix product."""
    rows = [
        [one["rule"], one["function"], f"{one['milliseconds']:.1f}", f"{one['ratio']:.2f}"] for one in found["rows"]
    ]
    for rule, time in found["forward_backward_milliseconds"].items():
        rows.append([rule, "ours, forward and backward", f"{time:.1f}", ""])
    yield from table(["rule", "function", "ms", "ratio"], rows)


def backend_cuda_table(found: Mapping) -> Iterator[str]:
    """Yield the times of the PyTorch backend's rule on a GPU beside fla's kernels, and of its parts."""
    rows, parts = [], []
    for one in found["results"]:
        for name in ("forward", "forward and backward"):
            for row in one[name]["rows"]:
                times = f"{row['milliseconds']:.2f}" if row["milliseconds"] is not None else "refused by fla"
                ratio = f"{row['times_fla']:.2f}" if row["times_fla"] is not None else ""
                rows.append([one["rule"], one["size"], name, row["function"], times, ratio])
        for chunk, times in one["parts"].items():
            cells = [f"{times[part]:.2f}" for part in times]
            parts.append([one["rule"], one["size"], chunk, *cells])
    yield from table(["rule", "K x V", "pass", "function", "ms", "times fla"], rows)
    yield from ("", "Parts of the forward pass, each alone, ms:", "")
    yield from table(["rule", "K x V", "tokens of a chunk", *found["results"][0]["parts"]["64"]], parts)


def speed_table(found: Mapping) -> Iterator[str]:
    """Yield how long a gradient step of `recover --mode reconstruct` takes in each way of running it."""
    rows = []
    for name, way in found["ways"].items():
        if "step" in way:
            times = [f"{1e3 * way['step']:.2f}", f"{1e3 * way['computing']:.2f}", f"{way['kernels_of_a_step']:.0f}"]
            rows.append([name, *times, f"{way['first']:.1f}", f"{way['recovery']['all']:.0f}"])
    header = ["steps", "ms a step", "of these computing", "kernels", "first layer besides, s", "all layers, s"]
    yield from table(header, rows)


def sequences_table(report: Mapping) -> Iterator[str]:
    """Yield the times of whole sequences in a benchmark's report, with 95% intervals, and the peak of memory."""
    names = {"mixer": "one mixer layer", "forward": "whole model, reading a prompt", "train_step": "a step of training"}
    rows = []
    for kind, name in names.items():
        for (batch_size, seq_len), entries in _grouped(report.get(kind, ()), "batch_size", "seq_len").items():
            where = f"{name}, {batch_size} x {seq_len:,} tokens"
            times = {one["label"]: _timed(one["latency_seconds"], 1e3, 2, one.get("speedup")) for one in entries}
            peaks = {one["label"]: f"{one['peak_memory_bytes'] / 2**20:,.0f}" for one in entries}
            rows += [_line(report, f"{where}, ms", times), _line(report, f"{where}, peak memory, MiB", peaks)]
    yield from table(["", *(one["label"] for one in report["models"])], rows)


def decode_table(report: Mapping) -> Iterator[str]:
    """Yield the times of a decoding step in a benchmark's report: as a CUDA graph where there is one."""
    names = {"operator": "operator", "mixer": "mixer layer", "model": "whole model"}
    rows = []
    for scope, name in names.items():
        steps = [entry for entry in report.get("decode", ()) if entry["scope"] == scope]
        for (batch_size,), entries in sorted(_grouped(steps, "batch_size").items()):
            cells = {}
            for entry in entries:
                way = entry["graph"] or entry["eager"]
                time = _timed(way["latency_seconds"], 1e6, 1, None)
                cells[entry["label"]] = f"{time}; {way['times_floor']:.2f} x bound"
            rows.append(_line(report, f"{name}, B={batch_size}, µs", cells))
    yield from table(["", *(one["label"] for one in report["models"])], rows)


def largest_table(report: Mapping) -> Iterator[str]:
    """Yield the largest batch that can be decoded, and how fast."""
    found = {entry["label"]: entry for entry in report["largest_batch"]}
    first = next(iter(found.values()))
    rows = []
    for name, unit, factor in (("batch_size", "sequences", 1), ("tokens_per_second", "1,000 tokens/s", 1000)):
        cells = {label: f"{one[name] / factor:,.0f} ({one[name] / first[name]:.2f})" for label, one in found.items()}
        rows.append(_line(report, unit, cells))
    yield from table(["", *(one["label"] for one in report["models"])], rows)


def kernels_table(files: Iterable[Mapping]) -> Iterator[str]:
    """Yield which sizes of a head the kernels of engines compile for."""
    rows = []
    for found in files:
        engine = next(name for name in ENGINES if name in found)
        version = f"{ENGINES[engine]} {found[engine]}, Triton {found['triton']}"
        for (kernels, architecture), entries in _grouped(found["rows"], "kernels", "architecture").items():
            sizes = {True: [], False: []}
            for entry in entries:
                sizes[entry["compiles"]].append(f"{entry['head_k_dim']}x{entry['head_v_dim']}")
            cells = [", ".join(sizes[compiles]) for compiles in (True, False)]
            rows.append([version, f"`{kernels}`", f"sm_{architecture}", *cells])
    yield from table(["engine", "kernels of", "GPU", "compile for K x V", "do not"], rows)


def capacity_table(found: Mapping) -> Iterator[str]:
    """Yield the sequences that vLLM admits without prefix caching on one GPU, of each model, size and format."""
    shown = [row for row in found["settings"] if row["gpus"] == 1 and not row["prefix_caching"]]
    rows = []
    for (name, dtype), entries in _grouped(shown, "config", "state_dtype").items():
        config = found["configs"][name]
        inner = config.get("text_config", config)
        if "linear_attn_config" in inner:
            sizes = (inner["linear_attn_config"]["head_dim"],) * 2
        else:
            sizes = inner["linear_key_head_dim"], inner["linear_value_head_dim"]
        asked = "what its config says" if dtype == "auto" else dtype
        admitted = "; ".join(f"{row['admitted']:,} of {row['tokens']:,}" for row in entries)
        memory = "/".join(sorted({str(row["memory_gib"]) for row in entries}))
        rows.append([f"`{config['model_type']}`", f"{sizes[0]} x {sizes[1]}", asked, memory, admitted])
    yield from table(["model", "K x V", "state in", "GiB for caches", "sequences admitted, of so many tokens"], rows)


def methods_table(found: Mapping, target: str) -> Iterator[str]:
    """Yield perplexity over dense by method, model and share removed, of a sweep; spreads are over seeds."""
    chosen = [row for row in found["rows"] if row["target"] == target]
    columns = list(dict.fromkeys((row["model"], row["ratio"]) for row in chosen))
    lines: dict[tuple[str, str], dict[tuple[str, float], str]] = {}
    for row in chosen:
        figure = row["increase"]
        more = "" if figure["spread"] is None else f" ± {100 * figure['spread']:.1f}"
        cell = f"{100 * figure['mean']:+.1f}{more}%"
        lines.setdefault((row["label"], row["repair"]), {})[row["model"], row["ratio"]] = cell
    rows = []
    for (label, repair), cells in lines.items():
        name = f"`{label}`" + ("" if repair == "none" else f", {repair}")
        rows.append([name, *(cells.get(column, "") for column in columns)])
    yield from table([f"{target}", *(f"{model}, {100 * ratio:g}%" for model, ratio in columns)], rows)


def _grouped(entries: Iterable[Mapping], *names: str) -> dict[tuple, list[Mapping]]:
    groups: dict[tuple, list[Mapping]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[name] for name in names), []).append(entry)
    return groups


def _line(report: Mapping, name: str, cells: Mapping[str, str]) -> list[str]:
    """Return a row with a cell for each model of a report; one that was not measured has an empty one."""
    return [name, *(cells.get(one["label"], "") for one in report["models"])]


def _timed(time: Mapping, factor: float, digits: int, speedup: Mapping | None) -> str:
    low, median, high = (f"{factor * time[name]:,.{digits}f}" for name in ("low", "median", "high"))
    return f"{median} ({low} to {high})" + (f", {speedup['median']:.2f} x" if speedup else "")

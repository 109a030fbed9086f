"""``keyreduce eval``: dense against pruned, in quality."""

from collections.abc import Sequence
from statistics import fmean

from keyreduce.api import evaluate, many
from keyreduce.cli.console import Console, mebibytes

_TITLES = {"perplexity_per_token": "perplexity", "perplexity_increase": "over dense", "bits_per_byte": "bits per byte"}
_MOST_HEADS = 5


def show(request: evaluate.EvaluateRequest, console: Console) -> None:
    """Measure the models, and print tables of what was found; then refuse where some of many could not be measured."""
    result = evaluate.run(request, console)
    if result is None:
        return
    models = result.content["models"]
    if request.base is not None:
        _show_many(console, models)
    else:
        _show_perplexity(console, result.content)
        if "recall" in result.content:
            _show_recall(console, models)
        for entry in models:
            if "precision" in entry:
                _show_states(console, entry["label"], entry["precision"])
        if request.tasks:
            _show_tasks(console, models)
    console.say(f"wrote {result.output}")
    console.finish(result)
    if request.base is not None:
        many.refuse_failed(models)


def _show_perplexity(console: Console, report: dict) -> None:
    names = ("perplexity_per_token", "perplexity_per_word", "bits_per_byte")
    rows = []
    for entry in report["models"]:
        rows.append((entry["label"], *(_metric(name, entry.get(name)) for name in (*names, "perplexity_increase"))))
    how = f", one every {report['stride']}" if report["stride"] < report["seq_len"] else ""
    how += ", each document on its own" if report["by_document"] else ""
    console.table(
        f"{report['models'][0]['predictions']:,} predictions in rows of {report['seq_len']} tokens{how}",
        ("", *(name.replace("_", " ") for name in names), "perplexity over dense"),
        rows,
    )


def _show_recall(console: Console, entries: Sequence[dict]) -> None:
    """Print a table a kind: for each cell of the grid a row a model."""
    from keyreduce.evaluation.probes import CHOICES
    from keyreduce.evaluation.recall import KINDS

    for kind, cells in entries[0]["recall"].items():
        rows = []
        for number, cell in enumerate(cells):
            place = (f"{cell['length']:,}", str(cell["pairs"]))
            for entry in entries:
                own = entry["recall"][kind][number]
                shares = (f"{own[name]:.1%}" for name in ("accuracy", "choice_accuracy"))
                rows.append((*place, entry["label"], *shares, f"{own['rank']:,.1f}", f"{own['log_probability']:.2f}"))
                place = ("", "")
        header = ("tokens", "pairs", "", "right", f"right of {CHOICES}", "mean rank", "log-probability")
        console.table(f"{KINDS[kind]}, {cells[0]['probes']} sequences a row", header, rows)


def _show_states(console: Console, label: str, precision: dict) -> None:
    """Print what keeping the state in other formats costs: in all, along the sequence, and the heads that it hurts."""
    states, chunk = precision["states"], precision["chunk"]
    when = "each token" if chunk is None else f"every {chunk:,} tokens"
    kinds = list(states[0].get("recall", {}))
    rows = []
    for state in states:
        shares = [f"{fmean(cell['choice_accuracy'] for cell in state['recall'][kind]):.1%}" for kind in kinds]
        increase = state["perplexity_increase"]
        cost = _metric("perplexity_per_token", state["perplexity_per_token"]), f"{increase:+.2%}" if increase else ""
        rows.append((state["dtype"], mebibytes(state["bytes_per_sequence"]), *cost, *shares))
    header = ("state in", "of a sequence", "perplexity", "over float32", *(f"{kind}, right" for kind in kinds))
    console.table(f"{label}: the state rounded after {when}", header, rows)
    exact = states[0]["drift"]
    first = ("float32", *(f"{part['nats']:.4f}" for part in exact))
    others = [(state["dtype"], *(f"{part['difference']:+.4f}" for part in state["drift"])) for state in states[1:]]
    places = (f"{part['start']:,} to {part['end'] - 1:,}" for part in exact)
    console.table("nats of a prediction by position, and the difference from float32", ("", *places), [first, *others])
    if heads := precision.get("heads"):
        _show_heads(console, heads, precision["memory_correlation"])


def _show_heads(console: Console, heads: Sequence[dict], correlations: dict) -> None:
    """Print the heads whose readout changes most where all formats hurt, and how that goes with their memory."""
    names = list(correlations)
    worst = sorted(heads, key=lambda head: -head["errors"][names[-1]])[:_MOST_HEADS]
    rows = []
    for head in worst:
        memory = "" if head["memory_tokens"] is None else f"{head['memory_tokens']:,.0f}"
        errors = (f"{head['errors'][name]:.2%}" for name in names)
        rows.append((f"layer {head['layer']}, head {head['head']}", memory, *errors))
    known = ("" if correlations[name] is None else f"{correlations[name]:+.2f}" for name in names)
    rows.append(("correlation with memory", f"{len(heads)} heads", *known))
    title = f"relative error of what heads read out of their state, the worst by {names[-1]}"
    console.table(title, ("", "memory, tokens", *names), rows)


def _show_tasks(console: Console, entries: Sequence[dict]) -> None:
    """Print the metrics of tasks: models side by side, and how the second differs from the first."""
    first, *others = (entry["label"] for entry in entries)
    rows = []
    for metrics in zip(*(entry["tasks"] for entry in entries), strict=True):
        values = [metric["value"] for metric in metrics]
        name = f"{metrics[0]['task']} {metrics[0]['metric']}"
        row = [name, *(_metric(name, value) for value in (*values, metrics[0]["stderr"]))]
        if others:
            row.append("" if None in values[:2] else _digits(values[1] - values[0], "+"))
        rows.append(row)
    header = ("", first, *others, f"± of {first}", *(["difference"] if others else []))
    console.table("lm-evaluation-harness", header, rows)


def _show_many(console: Console, entries: Sequence[dict]) -> None:
    """Print one row a model, and a column a metric, but for perplexity per word, which is in the files."""
    found = dict.fromkeys(name for entry in entries for name in entry["figures"])
    columns = [name for name in _TITLES if name in found]
    columns += [name for name in found if name not in _TITLES and name != "perplexity_per_word"]
    rows = []
    for entry in entries:
        rows.append((entry["name"], *(_metric(name, entry["figures"].get(name)) for name in columns), entry["state"]))
    console.table(f"{len(entries)} models", ("", *(_TITLES.get(name, name) for name in columns), ""), rows)


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name == "perplexity_increase":
        return f"{value:+.1%}"
    if name == "perplexity_per_token" and value < 1e6:
        return f"{value:,.4f}"
    return _digits(value)


def _digits(value: float, sign: str = "") -> str:
    """Return a figure in at most five digits, but before a decimal point in as many as there are below a million."""
    if abs(value) >= 1e6:
        return f"{value:{sign}.3e}"
    decimals = 4 - sum(abs(value) >= bound for bound in (10, 100, 1_000, 10_000))  # four of what is not a number
    return f"{value:{sign},.{decimals}f}"

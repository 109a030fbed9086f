"""``keyreduce eval``: dense against pruned, in quality."""

from collections.abc import Sequence

from keyreduce.api import evaluate, many
from keyreduce.cli.console import Console

_TITLES = {"perplexity_per_token": "perplexity", "perplexity_increase": "over dense", "bits_per_byte": "bits per byte"}


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


def _show_tasks(console: Console, entries: Sequence[dict]) -> None:
    """Print the metrics of tasks: models side by side, and how the second differs from the first."""
    first, *others = (entry["label"] for entry in entries)
    rows = []
    for metrics in zip(*(entry["tasks"] for entry in entries), strict=True):
        values = [metric["value"] for metric in metrics]
        name = f"{metrics[0]['task']} {metrics[0]['metric']}"
        row = [name, *(_metric(name, value) for value in (*values, metrics[0]["stderr"]))]
        if others:
            row.append("" if None in values[:2] else f"{values[1] - values[0]:+.4f}")
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
    return f"{value:,.4f}" if abs(value) < 1e6 else f"{value:.3e}"

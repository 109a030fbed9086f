"""The tables of `scale_study.py`, from its JSON files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from result_tables import REPAIR_WORDS, UNREPAIRED, table

from keyreduce.families import family_of
from keyreduce.outputs import read_json
from keyreduce.serving.state_formats import bytes_of

_NO_TIME = ("s are left", "no time is left", "time of this call was over", "what it begins with was not made")
"""What `scale_study.py` says of a step for which there was not time, or not for one before it."""
_REPAIRS = (*UNREPAIRED, "least-squares", "reconstruct")  # or how their names begin, in the order of the rows


def print_tables(folder: Path) -> None:
    """Print as Markdown what the models are, what each repair leaves, and what was left out."""
    found = [read_json(path) for path in sorted(folder.glob("*.json"))]
    print("", *scale_tables(found), sep="\n")


def scale_tables(found: Sequence[Mapping]) -> Iterator[str]:
    """Yield the lines of all tables, of the files of one study or of several."""
    found = sorted(found, key=lambda one: (one["config"]["model_type"], one.get("training", {}).get("parameters", 0)))
    header = ["model", "parameters", "trained on, tokens", "tokens/s", "minutes", "perplexity"]
    yield from table(header, [_model_row(one) for one in found if "training" in one])
    measured = [one for one in found if one.get("runs")]
    if measured:
        yield from ("", "Increase of perplexity over the dense model:", "")
        yield from _runs_table(measured, lambda run, dense: f"{round(rise(run, dense), 2) + 0.0:+.2f}%")
        for kind in measured[0]["dense"]["recall"]:
            yield from ("", f"{kind}: share right, of eight answers, and its difference from the dense model:", "")
            yield from _runs_table(measured, lambda run, dense, kind=kind: _recall_cell(run, dense, kind))
        yield from ("", "Seconds of the repair:", "")
        yield from _runs_table(measured, lambda run, dense: f"{run['seconds']:.0f}" if run.get("seconds") else "")
    left_out = [(one["model"], name, why) for one in found for name, why in one.get("left_out", {}).items()]
    failed = [step for step in left_out if not any(words in step[2] for words in _NO_TIME)]
    if len(failed) < len(left_out):
        yield from ("", "Cells are empty where there was not time for a step.")
    for model, name, why in failed:
        yield from ("", f"{model}, {name}, was left out: {why}.")


def rise(run: Mapping, dense: Mapping) -> float:
    """Return the increase of perplexity over the dense model in percent."""
    return 100 * (run["perplexity"] / dense["perplexity"] - 1)


def state_bytes(config: Mapping, run: Mapping) -> int:
    """Return what the state of a sequence takes in the sizes and the format of a run; without sizes the dense ones."""
    layers = family_of(config).layer_sizes(config)
    if "sizes" in run:
        heads, keys, values = run["sizes"]
        layers = {
            layer: sizes._replace(
                key_heads=heads,
                value_heads=heads * sizes.value_heads // sizes.key_heads,
                head_k_dim=keys,
                head_v_dim=values,
            )
            for layer, sizes in layers.items()
        }
    return bytes_of(run.get("state_dtype", "float32"), layers)


def removed(run: Mapping) -> float:
    """Return the share of the state's numbers that a run was to remove."""
    return float(run["ratio"].removeprefix("state="))


def _model_row(one: Mapping) -> list[str]:
    training = one["training"]
    sizes = [f"{training['parameters'] / 1e6:.1f}M", f"{training['tokens_seen'] / 1e6:.1f}M"]
    speed = [f"{training['tokens_per_second'] or 0:,}", f"{training['seconds'] / 60:.1f}"]
    return [one["model"], *sizes, *speed, f"{one['dense']['perplexity']:.3f}" if "dense" in one else ""]


def _runs_table(found: Sequence[Mapping], tell: Callable[[Mapping, Mapping], str]) -> Iterator[str]:
    """Yield a row for each cut, repair and format, with a column for each model, where it has something to tell."""
    rows = []
    for key in sorted(dict.fromkeys(_key_of(run) for one in found for run in one["runs"]), key=lambda key: key[:3]):
        cells = []
        for one in found:
            runs = [run for run in one["runs"] if _key_of(run) == key]
            cells.append(tell(runs[0], one["dense"]) if runs else "")
        share, _, tokens, repair, dtype = key
        if any(cells):
            about = [f"-{100 * share:g}%", dtype, REPAIR_WORDS.get(repair, repair)] if share else ["whole", dtype, ""]
            rows.append([*about, f"{tokens:,}" if tokens else "", *cells])
    yield from table(["state", "kept in", "repair", "tokens distilled", *(one["model"] for one in found)], rows)


def _key_of(run: Mapping) -> tuple[float, int, int, str, str]:
    """Return what a run is of, the order of rows first; a repair comes when the shorter ones have come."""
    dtype = run.get("state_dtype", "float32")
    place = next((place for place, name in enumerate(_REPAIRS) if run["repair"].startswith(name)), len(_REPAIRS))
    return removed(run), 10 * place + (dtype != "float32"), run["tokens"], run["repair"], dtype


def _recall_cell(run: Mapping, dense: Mapping, kind: str) -> str:
    if kind not in run.get("recall", {}):
        return ""
    right, base = run["recall"][kind], dense["recall"][kind]
    return f"{100 * right:.1f}% ({100 * (right - base):+.1f})"

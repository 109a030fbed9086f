"""``keyreduce compare``: two calibration files or two pruned models, and whether they make the same choice."""

from keyreduce.api import compare
from keyreduce.cli.console import Console

_LONGEST = 40  # characters of a value that are shown


def show(request: compare.CompareRequest, console: Console) -> None:
    """Compare, and print what differs."""
    result = compare.run(request, console)
    measures = ("overlap", "correlation") if result.kind == "calibrations" else ("overlap",)
    columns = [(target, measure) for target in result.overlap for measure in measures]
    rows = [[str(row["layer"]), *(_share(row[target][name]) for target, name in columns)] for row in result.layers]
    header = ("layer", *(f"{target}s: {measure}" for target, measure in columns))
    console.table(f"what both keep, {result.kind}", header, rows)
    if result.differing:
        rows = [[name, *map(_text, values)] for name, values in result.differing.items()]
        console.table("", ("made from", "first", "second"), rows)
    if result.is_same:
        console.say("they make the same choice: every head and channel that one keeps, the other keeps too")
    else:
        shares = ", ".join(f"{overlap:.1%} of the {target}s" for target, overlap in result.overlap.items())
        console.say(f"they differ: both keep {shares} that one keeps, in the mean of all layers")
    console.finish(result)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _text(value: object) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"

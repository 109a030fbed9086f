"""The tables of `repair_diagnosis.py`, from its JSON."""

import math
from collections.abc import Iterator, Mapping

from result_tables import table


def print_report(report: Mapping) -> None:
    """Print all tables as Markdown."""
    sizes = report["sizes"]
    print(f"{report['model']}, {report['parameters'] / 1e6:.0f}M, {sizes['head_k_dim']} x {sizes['head_v_dim']} kept")
    tokens = f"{report['calibration_tokens']:,} calibration tokens, {report['heldout_tokens']:,} held-out ones"
    print(f"{report['device']}, {report['seconds']:.0f} s; {tokens}")
    print(f"perplexity of the dense model {math.exp(report['dense']['heldout']):.3f}; increase over it:")
    for lines in (variants_table, layers_table, directions_table, sums_table):
        print("", *lines(report), sep="\n")


def variants_table(report: Mapping) -> Iterator[str]:
    """Yield what each repair leaves of the loss, and removes of the errors of mixers."""
    dense, rows = report["dense"], []
    for name, one in {"none": report["pruned"], **report["variants"]}.items():
        cells = [rise(one["heldout"], dense["heldout"]), f"{one['recall'] - dense['recall']:+.3f}"]
        cells += [f"{one[key]:.1%}" if key in one else "" for key in ("in_sample", "out_of_sample")]
        rows.append([name, *cells, f"{one['seconds']:.0f}" if "seconds" in one else ""])
    yield from table(["repair", "perplexity", "recall, nats", "removed in sample", "out of sample", "seconds"], rows)


def layers_table(report: Mapping) -> Iterator[str]:
    """Yield what each layer's cut costs and its refit wins back."""
    few, rows = report["few_rows"], []
    for layer, one in report["layers"].items():
        pairs = (("alone", "dense"), ("spared", "pruned"), ("undone", "repaired"))
        losses = [rise(one[name], few[whole]) for name, whole in pairs]
        shares = [f"{one[name]:.1%}" for name in ("missing", "in_sample", "out_of_sample")]
        rows.append([layer, *losses, *shares, f"{one['condition']:.1e}", f"{one['ridge']:g}"])
    removed = ("removed in sample", "out of sample")
    yield from table(["layer", "alone", "spared", "undone", "missing", *removed, "condition", "strength"], rows)


def directions_table(report: Mapping) -> Iterator[str]:
    """Yield how much of the residual stream, of its error and of the mixer's inputs lies in few directions."""
    names = ("relative_error", "channel_1", "direction_1", "directions_4", "error_direction_1", "error_in_directions_4")
    rows = [
        [layer, *(f"{one[name]:.1%}" for name in names), f"{one['directions_used']:.0f}"]
        for layer, one in report["layers"].items()
    ]
    yield from table(["before layer", *(name.replace("_", " ") for name in names), "directions used"], rows)


def sums_table(report: Mapping) -> Iterator[str]:
    """Yield whether errors of layers add up or cancel."""
    rows = [
        [layer, *(f"{one[name]:.2%}" for name in ("all", "squares", "vectors"))]
        for layer, one in report["sums"].items()
    ]
    yield from table(["after block", "all pruned", "sum of squares", "square of sum"], rows)


def rise(loss: float, dense: float) -> str:
    """Return how much higher than the dense model's a perplexity is."""
    return f"{100 * math.expm1(loss - dense):+.2f}%"

"""``keyreduce rank``: how much of its rank the state uses, dense against pruned, in figures and pictures."""

from collections.abc import Sequence
from pathlib import Path

from keyreduce.api import rank
from keyreduce.cli.console import Console


def show(request: rank.RankRequest, console: Console) -> None:
    """Measure the models, and print a table of the layers."""
    result = rank.run(request, console)
    columns = (f"{entry['label']}: K x V" for entry in result.models)
    console.table(
        f"rank utilisation of {result.models[-1]['sequences']:,} sequences of {result.positions[-1]:,} tokens, "
        "mean of the heads",
        ("layer", *(name for column in columns for name in (column, "mean", "at end"))),
        _rows(result.models),
    )
    folder = Path(result.pictures[0]).parent
    console.say(f"wrote {result.output}, and {len(result.pictures)} pictures in {folder}")
    console.finish(result)


def _rows(entries: Sequence[dict]) -> list[tuple[str, ...]]:
    """A row a layer: of each model the state's size, the mean along the sequence, and the last position."""
    rows = []
    for layers in zip(*(entry["layers"] for entry in entries), strict=True):
        row = [str(layers[0]["layer"])]
        for layer in layers:
            heads = layer["utilisation"]
            means = [sum(head) / len(head) for head in heads], [head[-1] for head in heads]
            row.append(f"{layer['head_k_dim']} x {layer['head_v_dim']}")
            row += [f"{100 * sum(shares) / len(shares):.2f}%" for shares in means]
        rows.append(tuple(row))
    return rows

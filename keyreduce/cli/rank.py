"""``keyreduce rank``: the stable rank of the state, dense against pruned, in figures and pictures."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from keyreduce.api import rank
from keyreduce.cli.console import Console


def show(request: rank.RankRequest, console: Console) -> None:
    """Measure the models, and print a table of the layers."""
    result = rank.run(request, console)
    models, pictures = result.content["models"], result.content["pictures"]
    amount = f"{models[-1]['sequences']:,} sequences of {result.content['positions'][-1]:,} tokens"
    header = [name for entry in models for name in (f"{entry['label']}: K x V", "mean", "at end")]
    console.table(f"stable rank, mean of the heads: {amount}", ("layer", *header), _rows(models))
    console.say(f"wrote {result.output}, and {len(pictures)} pictures in {Path(pictures[0]).parent}")
    console.finish(result)


def _rows(entries: Sequence[dict]) -> list[list[str]]:
    """A row a layer: of each model the state's size, the mean along the sequence, and the last position."""
    rows = []
    layers_of = [{layer["layer"]: layer for layer in entry["layers"]} for entry in entries]
    for number in sorted(set().union(*layers_of)):  # models that are not related may have others
        row = [str(number)]
        for layers in layers_of:
            if (layer := layers.get(number)) is None:
                row += [""] * 3
                continue
            heads = layer["utilisation"]
            means = fmean(fmean(head) for head in heads), fmean(head[-1] for head in heads)
            sides = layer["head_k_dim"], layer["head_v_dim"]
            row += [f"{sides[0]} x {sides[1]}", *(f"{min(sides) * share:.2f}" for share in means)]
        rows.append(row)
    return rows

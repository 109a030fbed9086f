"""``keyreduce rank``: how much of its rank the state uses, dense against pruned, in figures and pictures."""

from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options


def rank(
    model: options.DenseModel = None,
    compressed: options.Compressed = None,
    work: options.Work = options.DEFAULT_WORK,
    text: options.Text = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = None,
    num_batches: options.MeasuredBatches = 4,
    batch_size: options.BatchSize = 4,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens in a row.")] = 1024,
    every: Annotated[int, typer.Option(min=1, help="Look at the states after so many tokens each.")] = 64,
    output: options.Figures = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="The pictures, as PNG; --overwrite replaces them too.", show_default="in --work"
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure how much of its rank each head's state uses along the sequence, and draw it.

    Rank utilisation is the stable rank of the state as a share of the largest rank it could have. The pictures also
    show the channels that pruning kept, and the convolution kernels. Text is taken in its own order, so --seed changes
    nothing here.
    """
    from itertools import islice

    from keyreduce.api.pair import load_pair
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.cli.console import Console
    from keyreduce.data.batches import batches, token_rows
    from keyreduce.data.text import text_source
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.evaluation.kept import is_cut_of, kept_channels
    from keyreduce.evaluation.picture_folder import draw_folder, refuse_other_files
    from keyreduce.evaluation.rank import measure_rank
    from keyreduce.outputs import refuse_existing, refuse_unwritable, write_json
    from keyreduce.pruning.prune import read_record
    from keyreduce.workspace import Workspace

    console, workspace = Console(as_json=json), Workspace(work)
    target, folder = output or workspace.rank, plot or workspace.rank_pictures
    refuse_existing(output, overwrite)
    refuse_unwritable(target, folder=False)
    refuse_existing(plot, overwrite)
    refuse_unwritable(folder, folder=True)
    refuse_other_files(folder)
    source = text_source(text or (), dataset, dataset_config, split, default="heldout")
    device = pick_device(device)
    models = load_pair(console, model, compressed, workspace, device, pick_dtype(dtype, device), unrelated=False)
    sizes = {label: loaded.family.layer_sizes(loaded.model.config.to_dict()) for label, loaded in models.items()}
    cut = list(models)[-1]  # or the dense one, which lacks nothing
    kept = kept_channels(read_record(models[cut].folder)) if cut != "dense" else {}
    if kept and not is_cut_of(kept, sizes["dense"], sizes[cut]):
        console.note("the pruned model was not made from this dense one: its heads are counted, its channels not drawn")
        kept = {}
    num_rows = num_batches * batch_size or None
    report = {"text": source.describe(), "seq_len": seq_len, "every": every, "models": []}
    for label, loaded in models.items():
        rows = islice(token_rows(source.documents(), loaded.tokenizer, seq_len), num_rows)
        with console.progress(f"measuring {label}", (num_rows or 0) * seq_len or None, "tokens") as progress:
            found = measure_rank(loaded, batches(rows, batch_size), every, progress)
        heads = {layer: one.value_heads for layer, one in kept.items()} if label == cut else {}
        report["positions"] = list(found.positions)
        report["models"].append(
            {
                "label": label,
                "folder": str(loaded.folder),
                "sequences": found.sequences,
                "layers": found.to_json(heads),
            }
        )
    if found.positions[-1] < seq_len:
        console.note(f"the text is shorter than one sequence: {found.positions[-1]} tokens instead of {seq_len}")
    with console.progress("drawing", None, "pictures"):
        names = draw_folder(folder, report, kept, open_folder(models["dense"].folder))
    report["pictures"] = [str(folder / name) for name in names]
    write_json(target, report, overwrite=True)
    console.table(
        f"rank utilisation of {found.sequences:,} sequences of {found.positions[-1]:,} tokens, mean of the heads",
        ("layer", *(column for label in models for column in (f"{label}: K x V", "mean", "at end"))),
        _table(report["models"]),
    )
    console.say(f"wrote {target}, and {len(names)} pictures in {folder}")
    console.result(report)


def _table(entries: list[dict]) -> list[tuple[str, ...]]:
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

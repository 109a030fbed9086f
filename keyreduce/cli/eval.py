"""``keyreduce eval``: dense against pruned, in quality."""

from typing import Annotated

import typer

from keyreduce.cli import options


def evaluate(
    model: options.DenseModel = None,
    compressed: options.Compressed = None,
    work: options.Work = options.DEFAULT_WORK,
    text: options.Text = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = None,
    num_batches: Annotated[
        int, typer.Option(envvar="NUM_BATCHES", min=0, help="Batches to measure on; 0 takes all the text.")
    ] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 4,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a row.")] = 1024,
    output: options.Figures = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure held-out perplexity and bits per byte of the dense and of the pruned model.

    Text is taken in its own order, so --seed changes nothing here.
    """
    from keyreduce.cli.console import Console
    from keyreduce.cli.pair import load_pair
    from keyreduce.data.text import text_source
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.evaluation.perplexity import evaluate as measure
    from keyreduce.workspace import Workspace, refuse_existing, refuse_unwritable, write_json

    console, workspace = Console(as_json=json), Workspace(work)
    refuse_existing(output, overwrite)
    refuse_unwritable(output or workspace.evaluation, folder=False)
    source = text_source(text or (), dataset, dataset_config, split, default="heldout")
    device = pick_device(device)
    models = load_pair(console, model, compressed, workspace, device, pick_dtype(dtype, device))
    num_rows = num_batches * batch_size or None
    report = {"text": source.describe(), "seq_len": seq_len, "models": []}
    for label, loaded in models.items():
        with console.progress(f"measuring {label}", (num_rows or 0) * seq_len or None, "tokens") as progress:
            cost, is_short = measure(
                loaded, source, seq_len=seq_len, batch_size=batch_size, num_rows=num_rows, progress=progress
            )
        if is_short:
            console.note(f"the text is shorter than one sequence: {cost.predictions + 1} tokens instead of {seq_len}")
        report["models"].append(
            {
                "label": label,
                "folder": str(loaded.folder),
                "perplexity_per_token": cost.perplexity,
                "bits_per_byte": cost.bits_per_byte,
                "predictions": cost.predictions,
            }
        )
    dense = report["models"][0]
    for entry in report["models"][1:]:
        entry["perplexity_increase"] = entry["perplexity_per_token"] / dense["perplexity_per_token"] - 1
    write_json(output or workspace.evaluation, report, overwrite=True)
    rows = [
        (
            entry["label"],
            f"{entry['perplexity_per_token']:.4f}",
            f"{entry['bits_per_byte']:.4f}",
            f"{100 * entry['perplexity_increase']:+.1f}%" if "perplexity_increase" in entry else "",
        )
        for entry in report["models"]
    ]
    console.table(
        f"{dense['predictions']:,} predictions in rows of {seq_len} tokens",
        ("", "perplexity per token", "bits per byte", "perplexity over dense"),
        rows,
    )
    console.say(f"wrote {output or workspace.evaluation}")
    console.result(report)

"""``keyreduce recover``: a pruned model and text to the same model, repaired."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options
from keyreduce.recovery.modes import LEAST_SQUARES, MODES

_OF_RECONSTRUCT = "Options of --mode reconstruct"
_MODE_HELP = "\n\n".join(f"{name}: {summary}" for name, summary in MODES.items())


def recover(
    mode: Annotated[str, typer.Option(metavar="NAME", help=_MODE_HELP)] = LEAST_SQUARES,
    compressed: Annotated[
        str | None,
        typer.Option(
            envvar="COMPRESSED_MODEL",
            metavar="PATH",
            help="The pruned model to repair.",
            show_default="what prune wrote into --work",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--teacher",
            envvar="BASE_MODEL_DIR",
            metavar="PATH|NAME",
            help="The dense model that it is to be like.",
            show_default="what the pruned model was made from",
        ),
    ] = None,
    work: options.Work = options.DEFAULT_WORK,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The repaired checkpoint.", show_default="in --work")
    ] = None,
    text: options.Text = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = None,
    heldout: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE|FOLDER",
            rich_help_panel="Text",
            help="Other text, to measure perplexity on before and after; refused where it shares a document with the "
            "text of the repair. May be repeated.",
            show_default="not measured",
        ),
    ] = None,
    num_batches: options.NumBatches = 32,
    batch_size: options.BatchSize = 8,
    seq_len: options.SeqLen = 512,
    steps: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_OF_RECONSTRUCT, help="Gradient steps in each layer.", show_default="512"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=_OF_RECONSTRUCT, help="The highest learning rate.", show_default="0.0005"),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="mixer-in-block|mixer|block",
            rich_help_panel=_OF_RECONSTRUCT,
            help="Fit the mixer to what the dense block gives or to what the dense mixer gives, or mixer and MLP to "
            "what the dense block gives.",
            show_default="mixer-in-block",
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Win quality back after pruning, without training: layer by layer, from the bottom up, in float32.

    Each layer is fitted to what the dense model's layer gives, on the hidden states of the repaired layers below it.
    Sizes and config stay as pruned.
    """
    from keyreduce.cli.console import Console
    from keyreduce.data.text import FileText, text_source
    from keyreduce.devices import pick_device
    from keyreduce.errors import KeyreduceError
    from keyreduce.recovery.overlap import refuse_overlap
    from keyreduce.workspace import Workspace

    console, workspace = Console(as_json=json), Workspace(work)
    given = {"steps": steps, "lr": lr, "scope": scope}
    given = {name: value for name, value in given.items() if value is not None}
    run_on = pick_device(device)
    folder = compressed or str(workspace.pruned)
    if compressed is None and not workspace.pruned.is_dir():
        raise KeyreduceError(
            f"there is no pruned model at {workspace.pruned}; run keyreduce prune, or give --compressed"
        )
    source = text_source(text or (), dataset, dataset_config, split, default="calibration")
    judge = FileText(heldout) if heldout else None
    if judge is not None:
        refuse_overlap(source, judge)
    result = write_recovered(
        console,
        model,
        folder,
        source,
        output or workspace.recovered,
        mode=mode,
        options=given,
        amount=(num_batches, batch_size, seq_len, seed),
        device=run_on,
        overwrite=overwrite,
    )
    if judge is not None:
        result["perplexity"] = _measure(console, result, judge, run_on)
    console.result(result)


def write_recovered(
    console, model, compressed, text, target, *, mode, options, amount, device, overwrite=False
) -> dict:
    """Make the repaired checkpoint, or say that it is there already; return the command's JSON object.

    Args:
        console: where to print.
        model: the dense model, as a user names it; None takes the one that the pruned one's record names.
        compressed: the pruned model.
        text: a TextSource to calibrate on.
        target: the folder to make.
        mode: one of MODES.
        options: fields of Steps that are not its defaults; for reconstruct alone.
        amount: the fields of calibration Settings: batches, rows, tokens, seed.
        device: where to run.
        overwrite: whether an existing ``target`` is replaced.

    Raises:
        KeyreduceError: the mode or an option is unknown, the models do not belong together, or what
            keyreduce.recovery raises.
    """
    import time

    from keyreduce.calibration.run import Settings
    from keyreduce.checkpoint.find import find_model, model_name
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.cli.console import command_line
    from keyreduce.errors import KeyreduceError
    from keyreduce.pruning.prune import read_record
    from keyreduce.recovery.repair import check_pair, make_steps, repair
    from keyreduce.recovery.writing import read_repairs, write_repaired
    from keyreduce.workspace import is_already_made, refuse_source, refuse_unwritable

    settings = Settings(*amount)
    settings.check()
    steps = make_steps(mode, options)
    pruned = open_folder(find_model(compressed))
    record = read_record(pruned.path)
    name = model or record.get("dense")
    if name is None:
        raise KeyreduceError(f"{compressed} does not say what it was pruned from; name that with --model")
    config = record.get("dense_config") if model is None else None
    dense = open_folder(find_model(name, config=config and Path(config)))
    check_pair(dense, pruned)
    for source in (Path(compressed) if os.path.isdir(compressed) else pruned.path, dense.path):
        refuse_source(target, source)
    inputs = {
        "mode": mode,
        "options": {} if steps is None else steps._asdict(),
        "pruned": pruned.identity,
        "dense": dense.identity,
        "text": {**text.describe(), "identity": text.identity},
        **settings._asdict(),
    }
    repairs = read_repairs(target) if os.path.isdir(target) and not overwrite else None
    if is_already_made(target, repairs[-1]["inputs"] if repairs else None, inputs, overwrite):
        console.say(f"{target} is there already, from the same inputs")
        return {"recovered": str(target), "made": False, "pruned": str(pruned.path), "dense": str(dense.path)}
    refuse_unwritable(target, folder=True)
    console.note(f"repairing {Path(model_name(compressed)).name} on {device} ({mode}), {settings.tokens:,} tokens")
    start = time.perf_counter()
    with console.progress("repairing", dense.config.get("num_hidden_layers"), "layers") as progress:
        repaired = repair(
            dense, pruned, text, settings, steps=steps, device=device, progress=progress, note=console.note
        )
    seconds = time.perf_counter() - start
    write_repaired(
        pruned, repaired, target, inputs=inputs, seconds=seconds, command=command_line(), overwrite=overwrite
    )
    rows = [
        (str(layer), *(f"{100 * figures[name]:.2f}%" for name in ("missing_before", "missing_after")))
        for layer, figures in repaired.layers.items()
    ]
    console.table(
        f"{mode}, {repaired.tokens:,} tokens, {seconds:.0f} s: missing of the dense mixer's output",
        ("layer", "before", "after least squares"),
        rows,
    )
    console.say(f"wrote {target}")
    return {
        "recovered": str(target),
        "made": True,
        "mode": mode,
        "pruned": str(pruned.path),
        "dense": str(dense.path),
        "tokens": repaired.tokens,
        "seconds": seconds,
        "layers": {str(layer): figures for layer, figures in repaired.layers.items()},
    }


def _measure(console, result, heldout, device) -> dict[str, float]:
    import torch

    from keyreduce.evaluation.perplexity import evaluate
    from keyreduce.models.loading import load_model

    found = {}
    for label in ("dense", "pruned", "recovered"):
        loaded = load_model(Path(result[label]), device, torch.float32, gradients=True)
        cost, _ = evaluate(loaded, heldout, seq_len=1024, batch_size=4, num_rows=None)
        found[label] = cost.perplexity
    rows = [(label, f"{value:.4f}", f"{100 * (value / found['dense'] - 1):+.1f}%") for label, value in found.items()]
    console.table("held-out text", ("", "perplexity per token", "over dense"), rows)
    return found

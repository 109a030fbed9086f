"""``keyreduce calibrate``: text to statistics."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options


def calibrate(
    model: options.Model = None,
    work: options.Work = options.DEFAULT_WORK,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The calibration file.", show_default="in --work"),
    ] = None,
    text: options.Text = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = None,
    num_batches: options.NumBatches = 16,
    batch_size: options.BatchSize = 4,
    seq_len: options.SeqLen = 512,
    gradients: Annotated[
        bool,
        typer.Option("--gradients", help="Add what prune --method taylor needs; about three times slower."),
    ] = False,
    offload: Annotated[
        str | None,
        typer.Option(
            metavar="disk|cpu|auto",
            help="Where layers wait for their turn on the device (needs accelerate); auto fills all devices first.",
            show_default="the whole model on the device",
        ),
    ] = None,
    config: options.Config = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Run text through the model and keep running sums: one small file, for every method and every ratio.

    Under torchrun the batches are shared out among the processes.
    """
    from keyreduce.calibration.run import Settings
    from keyreduce.cli.console import Console
    from keyreduce.data.text import text_source
    from keyreduce.evaluation.processes import Processes
    from keyreduce.workspace import Workspace

    console, processes = Console(as_json=json), Processes.of_torchrun()
    console.errors.quiet = console.tables.quiet = processes.rank > 0
    result = write_calibration(
        console,
        model,
        text_source(text or (), dataset, dataset_config, split, default="calibration"),
        Settings(num_batches, batch_size, seq_len, seed),
        output or Workspace(work).calibration,
        config=config,
        device=processes.device(device),
        dtype=dtype,
        overwrite=overwrite,
        gradients=gradients,
        offload=offload,
        processes=processes,
    )
    if not processes.rank:
        console.result(result)


def write_calibration(
    console,
    model,
    text,
    settings,
    target,
    *,
    device,
    dtype,
    overwrite,
    config=None,
    gradients=False,
    offload=None,
    processes=None,
) -> dict:
    """Make the calibration file, or say that it is there already; return the command's JSON object."""
    from keyreduce.calibration.file import read_record, write_statistics
    from keyreduce.calibration.run import calibrate, describe_inputs
    from keyreduce.checkpoint.find import find_model, model_name
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.cli.console import megabytes
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.families import family_of
    from keyreduce.workspace import is_already_made, refuse_unwritable

    settings.check(gradients=gradients)
    source = open_folder(find_model(model, config=config))
    family_of(source.config)
    device = pick_device(device)
    dtype = pick_dtype(dtype, device)
    inputs = describe_inputs(source, text, settings, dtype, gradients=gradients)
    recorded = read_record(target)["inputs"] if os.path.exists(target) and not overwrite else None
    if recorded and recorded.get("gradients") and not gradients:
        recorded = {**recorded, "gradients": False}  # it holds all that is asked for, and more
    if is_already_made(target, recorded, inputs, overwrite):
        console.say(f"{target} is there already, from the same inputs")
        return {"calibration": str(target), "made": False}
    refuse_unwritable(target, folder=False)
    how = f"{inputs['dtype']}, with gradients" if gradients else inputs["dtype"]
    console.note(f"calibrating {Path(model_name(model)).name} on {device} ({how})")
    own_tokens = settings.tokens // (processes.number if processes is not None else 1)
    with console.progress("calibrating", own_tokens, "tokens") as progress:
        statistics = calibrate(
            source,
            text,
            settings,
            device=device,
            dtype=dtype,
            gradients=gradients,
            offload=offload,
            processes=processes,
            progress=progress,
            note=console.note,
        )
    if processes is not None and processes.rank:
        return {}
    write_statistics(statistics, target, overwrite=overwrite)
    size = target.stat().st_size
    console.say(
        f"wrote {target}: {statistics.tokens:,} tokens, {len(statistics.layers)} layers, {megabytes(size)}"
    )
    return {
        "calibration": str(target),
        "made": True,
        "model": str(source.path),
        "tokens": statistics.tokens,
        "layers": len(statistics.layers),
        "gradients": gradients,
        "bytes": size,
    }

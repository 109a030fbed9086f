"""``keyreduce recover``: a pruned model and text to the same model, repaired."""

from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options, training_options
from keyreduce.recovery.modes import LEAST_SQUARES, MODES, REPEATS
from keyreduce.recovery.training.settings import TRAINING_MODES

_OF_RECONSTRUCT = "Options of --mode reconstruct"
_MODE_HELP = "\n\n".join(f"{name}: {summary}" for name, summary in (MODES | TRAINING_MODES).items())


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
            envvar="BASE_MODEL_DIR",
            metavar="PATH|NAME",
            help="The dense model that it is to be like.",
            show_default="what the pruned model was made from",
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|NAME",
            help="The same; with --mode lora or full, a model of the same vocabulary to learn from.",
            show_default="lora and full learn from the text alone",
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
    repeats: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="With least-squares and reconstruct, the share of the rows that are random tokens, repeated, in the "
            "place of text: they keep recall.",
            show_default=f"{REPEATS:g}",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=_OF_RECONSTRUCT, help="Gradient steps in each layer.", show_default="512"),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="The highest learning rate, of gradient steps.",
            show_default="reconstruct 0.0005, lora 0.0005, full 0.0001",
        ),
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
    distill_weight: training_options.DistillWeight = None,
    temperature: training_options.Temperature = None,
    warmup: training_options.Warmup = None,
    micro_batch: training_options.MicroBatch = None,
    checkpointing: training_options.Checkpointing = False,
    shard: training_options.Shard = False,
    save_every: training_options.SaveEvery = None,
    kernels: training_options.Kernels = None,
    rank: training_options.Rank = None,
    alpha: training_options.Alpha = None,
    targets: training_options.Targets = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Win quality back after pruning. Sizes and config stay as pruned.

    least-squares and reconstruct go layer by layer, from the bottom up, in float32: each is fitted to what the dense
    model's layer gives, on the hidden states of the repaired layers below it. lora and full train the whole model:
    --num-batches steps of --batch-size rows, in one process or under torchrun.
    """
    from keyreduce.cli.console import Console
    from keyreduce.cli.recover_heldout import measure
    from keyreduce.cli.recover_layers import write_recovered
    from keyreduce.cli.recover_training import write_trained
    from keyreduce.data.text import FileText, text_source
    from keyreduce.devices import pick_device
    from keyreduce.errors import KeyreduceError
    from keyreduce.processes import Processes
    from keyreduce.recovery.overlap import refuse_overlap
    from keyreduce.workspace import Workspace

    console, workspace = Console(as_json=json), Workspace(work)
    processes, trains = Processes.of_torchrun(), mode in TRAINING_MODES
    given = {"steps": steps, "lr": lr, "scope": scope}
    given = {name: value for name, value in given.items() if value is not None}
    of_training = training_options.training_options(
        distill_weight=distill_weight,
        temperature=temperature,
        warmup=warmup,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        shard=shard,
        save_every=save_every,
        kernels=kernels,
        rank=rank,
        alpha=alpha,
        targets=targets,
    )
    if mode not in MODES | TRAINING_MODES:
        raise KeyreduceError(f"--mode {mode} is unknown; take one of {', '.join(MODES | TRAINING_MODES)}")
    if of_training and not trains:
        raise KeyreduceError(f"--mode {mode} takes no options of lora and full, such as {min(of_training)}")
    if repeats is not None and trains:
        raise KeyreduceError(f"--mode {mode} takes no --repeats; leave it out, or take one of {', '.join(MODES)}")
    if processes.number > 1 and not trains:
        raise KeyreduceError(f"--mode {mode} runs in one process: start keyreduce without torchrun")
    run_on = pick_device(processes.device(device))
    folder = compressed or str(workspace.pruned)
    if compressed is None and not workspace.pruned.is_dir():
        raise KeyreduceError(
            f"there is no pruned model at {workspace.pruned}; run keyreduce prune, or give --compressed"
        )
    source = text_source(text or (), dataset, dataset_config, split, default="train" if trains else "calibration")
    judge = FileText(heldout) if heldout else None
    if judge is not None:
        refuse_overlap(source, judge)
    target, amount = output or workspace.recovered, (num_batches, batch_size, seq_len, seed)
    if trains:
        if teacher is None and distill_weight is not None:
            teacher = model or ""
        result = write_trained(
            console,
            folder,
            source,
            target,
            mode=mode,
            options=given | of_training,
            teacher=teacher,
            amount=amount,
            device=run_on,
            processes=processes,
            overwrite=overwrite,
        )
        if result is None:
            return
        result["dense"] = result["dense"] or model
    else:
        result = write_recovered(
            console,
            model or teacher,
            folder,
            source,
            target,
            mode=mode,
            options=given,
            amount=amount,
            device=run_on,
            repeats=REPEATS if repeats is None else repeats,
            overwrite=overwrite,
        )
    if judge is not None:
        result["perplexity"] = measure(console, result, judge, run_on)
    console.result(result)

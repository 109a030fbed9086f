"""``keyreduce recover --mode lora|full``: a pruned model trained on, in one process or under ``torchrun``."""

import contextlib
import os
import shutil
from pathlib import Path


def write_trained(
    console, compressed, text, target, *, mode, options, teacher, amount, device, processes, overwrite=False
) -> dict | None:
    """Make the trained checkpoint, or say that it is there already; return the command's JSON object.

    Every process of ``torchrun`` calls it; the first one alone speaks and writes.

    Args:
        console: where to print.
        compressed: the pruned model.
        text: a TextSource to train on.
        target: the folder to make. Checkpoints of the training lie beside it until it is made.
        mode: ``lora`` or ``full``.
        options: fields of Training that are not its defaults.
        teacher: the model to learn from, as a user names it; "" takes the dense one that the pruned one's record names,
            None takes none.
        amount: the fields of calibration Settings: batches, rows, tokens, seed.
        device: where to run.
        processes: which of torchrun's processes this is.
        overwrite: whether an existing ``target``, and checkpoints of another training, are replaced.

    Returns:
        The object; None in all processes but the first.

    Raises:
        KeyreduceError: an option is unknown, or what keyreduce.recovery.training.run raises.
    """
    import time

    from keyreduce.calibration.run import Settings
    from keyreduce.checkpoint.find import find_model, model_name
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.cli.console import command_line
    from keyreduce.errors import KeyreduceError
    from keyreduce.outputs import is_already_made, refuse_source, refuse_unwritable
    from keyreduce.pruning.prune import read_record
    from keyreduce.recovery.record import read_repairs
    from keyreduce.recovery.repair import Repaired
    from keyreduce.recovery.training.checks import refuse_without_extra
    from keyreduce.recovery.training.picture import draw_losses
    from keyreduce.recovery.training.run import discard, train
    from keyreduce.recovery.training.settings import make_training
    from keyreduce.recovery.writing import write_repaired

    refuse_without_extra()
    settings, training = Settings(*amount), make_training(mode, options)
    settings.check()
    pruned = open_folder(find_model(compressed))
    record = read_record(pruned.path)
    dense = record.get("dense")
    if teacher == "" and dense is None:
        raise KeyreduceError(f"{compressed} does not say what it was pruned from; name that with --teacher")
    config = record.get("dense_config") if not teacher else None
    taught_by = None if teacher is None else open_folder(find_model(teacher or dense, config=config and Path(config)))
    sources = [
        pruned.path,
        *([Path(compressed)] if os.path.isdir(compressed) else []),
        *([taught_by.path] if taught_by else []),
    ]
    for source in sources:
        refuse_source(target, source)
    inputs = {
        "mode": mode,
        "options": training.describe(mode, is_distilled=taught_by is not None),
        "pruned": pruned.identity,
        "teacher": taught_by and taught_by.identity,
        "text": {**text.describe(), "identity": text.identity},
        **settings._asdict(),
    }
    is_first = processes.rank == 0
    paths = {"recovered": str(target), "pruned": str(pruned.path), "dense": dense}
    repairs = read_repairs(target) if os.path.isdir(target) and not overwrite else None
    if is_already_made(target, repairs[-1]["inputs"] if repairs else None, inputs, overwrite):
        if is_first:
            console.say(f"{target} is there already, from the same inputs")
        return paths | {"made": False} if is_first else None
    refuse_unwritable(target, folder=True)
    folder = target.with_name(f"{target.name}.training")
    how = f"{mode}, taught by {Path(model_name(str(taught_by.path))).name}" if taught_by else mode
    if is_first:
        console.note(f"training {Path(model_name(compressed)).name} on {device} ({how}), {settings.tokens:,} tokens")
    start = time.perf_counter()
    bar = console.progress("training", settings.tokens, "tokens") if is_first else contextlib.nullcontext()
    with bar as progress:
        trained = train(
            pruned,
            taught_by,
            text,
            settings,
            mode,
            training,
            device=device,
            folder=folder,
            recipe=inputs,
            anew=overwrite,
            progress=progress,
            note=console.note if is_first else lambda message: None,
        )
    if trained is None:
        return None
    seconds = time.perf_counter() - start
    if trained.passes > 1:
        console.note(f"the text was gone through {trained.passes} times")
    per_step = settings.batch_size * settings.seq_len
    few = max(1, len(trained.losses) // 20)
    figures = {
        "trained_parameters": trained.trained,
        "passes": trained.passes,
        "loss_first": sum(trained.losses[:few]) / few,
        "loss_last": sum(trained.losses[-few:]) / few,
        "losses": [[step * per_step, round(loss, 6)] for step, loss in zip(trained.steps, trained.losses, strict=True)],
    }

    def finish(made: Path) -> None:
        label = "loss" if taught_by is None else "loss with a teacher"
        draw_losses([step * per_step for step in trained.steps], trained.losses, label, made / "training.png")
        if (folder / "runs").is_dir():
            shutil.copytree(folder / "runs", made / "runs")  # tensorboard's

    write_repaired(
        pruned,
        Repaired(trained.tensors, trained.tokens, {}),
        target,
        inputs=inputs,
        seconds=seconds,
        command=command_line(),
        overwrite=overwrite,
        figures=figures,
        finish=finish,
    )
    discard(folder)
    console.say(
        f"{how}: {trained.tokens:,} tokens in {seconds:.0f} s, "
        f"loss {figures['loss_first']:.4f} -> {figures['loss_last']:.4f} nats per token"
    )
    console.say(f"wrote {target}, with training.png")
    del figures["losses"]
    return paths | {"made": True, "mode": mode, "tokens": trained.tokens, "seconds": seconds, **figures}

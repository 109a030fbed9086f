"""The part of ``keyreduce recover`` that goes layer by layer: its inputs' checks, its record, its table."""

import os
from pathlib import Path

from keyreduce.recovery.modes import REPEATS


def write_recovered(
    console, model, compressed, text, target, *, mode, options, amount, device, repeats=REPEATS, overwrite=False
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
        repeats: the share of the rows that are random tokens, repeated.
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
    from keyreduce.outputs import is_already_made, refuse_source, refuse_unwritable
    from keyreduce.pruning.prune import read_record
    from keyreduce.recovery.record import read_repairs
    from keyreduce.recovery.repair import check_pair, make_steps, repair
    from keyreduce.recovery.repeats import check_repeats
    from keyreduce.recovery.writing import write_repaired

    settings = Settings(*amount)
    settings.check()
    check_repeats(repeats)
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
        "repeats": repeats,
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
            dense,
            pruned,
            text,
            settings,
            steps=steps,
            device=device,
            repeats=repeats,
            progress=progress,
            note=console.note,
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

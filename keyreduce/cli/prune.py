"""``keyreduce prune``: statistics and a checkpoint to a smaller checkpoint."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options
from keyreduce.pruning.methods import METHODS

_METHOD_HELP = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())


def prune(
    model: options.Model = None,
    work: options.Work = options.DEFAULT_WORK,
    method: Annotated[
        str, typer.Option(envvar="PRUNING_STRATEGY", metavar="NAME", help=_METHOD_HELP)
    ] = "wanda",
    ratio: Annotated[
        float | None,
        typer.Option(
            envvar="PRUNING_RATIO", help="Share of each head's channels to remove.", show_default="0.25"
        ),
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Channels of each head to keep, instead of --ratio.")] = None,
    multiple_of: Annotated[int, typer.Option(help="Round what is kept to the nearest multiple.")] = 1,
    target: Annotated[str, typer.Option(metavar="key", help="What to remove: key channels.")] = "key",
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The calibration file.", show_default="in --work"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            envvar="OUTPUT_DIR", metavar="DIR", help="The pruned checkpoint.", show_default="in --work"
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove key channels, and write a checkpoint that fla and transformers load unchanged.

    A method that needs calibration sums runs keyreduce calibrate with its defaults first, where they are missing;
    --device and --dtype are for that.
    """
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.cli.console import Console
    from keyreduce.errors import KeyreduceError
    from keyreduce.families import family_of
    from keyreduce.models.loading import find_model, model_name, pick_device, pick_dtype
    from keyreduce.pruning import prune as pruning
    from keyreduce.pruning.methods import method_named
    from keyreduce.pruning.plan import channels_to_keep
    from keyreduce.workspace import Workspace, is_already_made, refuse_source

    console, workspace = Console(as_json=json), Workspace(work)
    chosen = method_named(method)
    if target != "key":
        raise KeyreduceError(f"there is no target {target!r}; keyreduce prunes key channels: --target key")
    pick_dtype(dtype, pick_device(device))  # a wrong one is told even where nothing is left to calibrate
    source = open_folder(find_model(model))
    family = family_of(source.config)
    sizes = family.sizes(source.config)
    if ratio is None and keep is None:
        ratio = 0.25
    kept = channels_to_keep(sizes.head_k_dim, ratio=ratio, keep=keep, multiple_of=multiple_of)
    folder = output or workspace.pruned
    refuse_source(folder, Path(model) if model and os.path.isdir(model) else source.path)

    inputs = {"source": source.identity, "method": method, "target": target, "keep": kept, "seed": seed}
    steps = None if overwrite else pruning.read_record(folder).get("steps")
    recorded = steps[-1]["inputs"] if steps else None
    statistics = None
    if chosen.needs_statistics:
        # What differs already is refused before calibration, which takes time and leaves a file.
        comparable = recorded and {name: value for name, value in recorded.items() if name != "calibration"}
        is_already_made(folder, comparable, inputs, overwrite)
        statistics = _statistics(console, model, source, calibration, workspace, device, dtype)
        inputs["calibration"] = statistics.inputs
    if is_already_made(folder, recorded, inputs, overwrite):
        console.say(f"{folder} is there already, from the same inputs")
        console.result({"pruned": str(folder), "made": False})
        return

    plan = pruning.make_plan(source, chosen, kept, seed=seed, statistics=statistics, inputs=inputs)
    total = sum(entry.end - entry.begin for _, entry in source.entries.values())
    with console.progress("writing", total, "B") as progress:
        pruning.write_pruned(
            source, plan, folder, dense=model_name(model), overwrite=overwrite, progress=progress
        )
    _report(console, Path(model_name(model)).name, source, plan, folder)


def _statistics(console, model, source, calibration, workspace, device, dtype):
    from keyreduce.calibration.file import read_record, read_statistics
    from keyreduce.calibration.run import Settings
    from keyreduce.cli.calibrate import write_calibration
    from keyreduce.cli.console import Console
    from keyreduce.data.text import text_source
    from keyreduce.pruning.prune import check_calibration

    path = calibration or workspace.calibration
    if calibration is None and not path.exists():
        console.note(f"there are no calibration sums at {path}: calibrating first")
        text = text_source(default="calibration")
        # What it says goes to stderr: this command's own result comes at the end.
        aside = Console(as_json=True)
        write_calibration(aside, model, text, Settings(), path, device=device, dtype=dtype, overwrite=False)
    check_calibration(source, read_record(path)["model"])
    return read_statistics(path)


def _report(console, name, source, plan, folder) -> None:
    from keyreduce.families import family_of
    from keyreduce.pruning.engines import suited_engines
    from keyreduce.pruning.prune import parameter_counts

    family = family_of(source.config)
    counts = parameter_counts(source, plan)
    state = [family.state_bytes(family.resized(source.config, sizes)) for sizes in (plan.before, plan.after)]
    suited, unsuited = suited_engines(plan.after)
    rows = [
        ("key channels a head", *(str(sizes.head_k_dim) for sizes in (plan.before, plan.after))),
        ("state per sequence, float32", *(f"{size / 2**20:,.2f} MiB" for size in state)),
        ("mixer parameters", *(f"{count:,}" for count in counts["mixer"])),
        ("model parameters", *(f"{count:,}" for count in counts["model"])),
    ]
    smaller = [
        f"{100 * (1 - after / before):.1f}%"
        for before, after in ((plan.before.head_k_dim, plan.after.head_k_dim), state, counts["mixer"], counts["model"])
    ]
    title = f"{name}, pruned with {plan.inputs['method']}"
    rows = [(*row, share) for row, share in zip(rows, smaller, strict=True)]
    console.table(title, ("", "before", "after", "smaller by"), rows)
    console.say(f"runs in: {'; '.join(suited) or 'no engine that keyreduce knows of'}")
    if unsuited:
        console.say(f"not in: {'; '.join(unsuited)}")
    console.say(f"wrote {folder}")
    console.result(
        {
            "pruned": str(folder),
            "made": True,
            "method": plan.inputs["method"],
            "head_k_dim": [plan.before.head_k_dim, plan.after.head_k_dim],
            "state_bytes_per_sequence": state,
            "mixer_parameters": counts["mixer"],
            "model_parameters": counts["model"],
            "suited_engines": suited,
        }
    )

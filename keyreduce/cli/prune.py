"""``keyreduce prune``: statistics and a checkpoint to a smaller checkpoint."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options
from keyreduce.pruning.methods import METHODS, registered_elsewhere
from keyreduce.recovery.modes import MODES

_METHOD_HELP = "\n\n".join(
    [
        *(f"{method.name}: {method.summary}" for method in METHODS.values()),
        *(f"{name}: from {point.value.split(':')[0]}" for name, point in registered_elsewhere().items()),
    ]
)
_OF_METHODS = "Options of single methods"


def prune(
    model: options.Model = None,
    work: options.Work = options.DEFAULT_WORK,
    method: Annotated[
        str, typer.Option(envvar="PRUNING_STRATEGY", metavar="NAME", help=_METHOD_HELP)
    ] = "auto",
    target: Annotated[
        str,
        typer.Option(
            metavar="key,value,head",
            help="What to remove: key channels, value channels, whole key heads, or several, with commas.",
        ),
    ] = "key",
    ratio: Annotated[
        str | None,
        typer.Option(
            envvar="PRUNING_RATIO",
            metavar="SHARE",
            help="Share to remove: of each head's channels, of a layer's heads. One for each target, with commas.",
            show_default="0.25",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", "--rank", metavar="NUMBER", help="How many to keep, instead of --ratio."),
    ] = None,
    multiple_of: Annotated[int, typer.Option(help="Round kept channels to the nearest multiple.")] = 1,
    allocate: Annotated[
        str,
        typer.Option(
            metavar="uniform|energy",
            help="Key channels of the layers: all alike, or where q and k have their energy, in all as many "
            "(delta_net_2 alone can say it).",
        ),
    ] = "uniform",
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
    f: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_OF_METHODS,
            help="rrqr: swap while one makes the kept block's volume more than f times as large.",
            show_default="1.5",
        ),
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", rich_help_panel=_OF_METHODS, help="rrqr: shuffle ties, by --seed.")
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="first|squared|element",
            rich_help_panel=_OF_METHODS,
            help="taylor: gradients summed with their sign, squared (Fisher), or weight by weight.",
            show_default="first",
        ),
    ] = None,
    include_queries: Annotated[
        bool,
        typer.Option("--include-queries", rich_help_panel=_OF_METHODS, help="pca: of q and k, not of k alone."),
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            rich_help_panel=_OF_METHODS,
            help="Any option of a method, also of one from another package; may be repeated.",
        ),
    ] = None,
    variance: Annotated[
        float | None,
        typer.Option(rich_help_panel=_OF_METHODS, help="pca: the rank that keeps this share, instead of --ratio."),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="logits",
            help="Before it appears, run it against the dense model with the dropped channels masked.",
            show_default="tensors and shapes alone",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="fla|transformers|vllm|sglang|mlx|llama.cpp",
            help="Refuse sizes that it does not run.",
            show_default="the result says which do",
        ),
    ] = None,
    recover: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Repair it before it appears, as keyreduce recover --mode NAME does: " + " or ".join(MODES) + ".",
            show_default="not repaired",
        ),
    ] = None,
    text: options.Text = None,
    dataset: options.Dataset = None,
    dataset_config: options.DatasetConfig = None,
    split: options.Split = None,
    config: options.Config = None,
    dtype: options.CastTo = None,
    max_shard_size: options.MaxShardSize = None,
    seed: options.Seed = 0,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Remove channels or heads, and write a checkpoint that fla and transformers load unchanged.

    A method that needs calibration sums runs keyreduce calibrate first, where they are missing; --device and the text
    are for that and for --recover, --device also for --verify.
    """
    from keyreduce.checkpoint.find import model_name, open_model
    from keyreduce.checkpoint.memory import freed_tensors_returned
    from keyreduce.checkpoint.writing import parse_size
    from keyreduce.cli.console import Console, command_line
    from keyreduce.cli.cut_report import report_cut
    from keyreduce.cli.prune_steps import calibrated, recorded_inputs, repair_cut
    from keyreduce.data.text import text_source
    from keyreduce.devices import dtype_named, pick_device
    from keyreduce.errors import KeyreduceError
    from keyreduce.models.skeleton import Skeleton
    from keyreduce.outputs import is_already_made, refuse_source, refuse_unwritable
    from keyreduce.pruning.budget import Budget
    from keyreduce.pruning.engines import check_engine
    from keyreduce.pruning.methods import method_named
    from keyreduce.pruning.planning import check_method, check_options, make_plan, read_options
    from keyreduce.pruning.prune import write_pruned
    from keyreduce.workspace import Workspace

    if verify not in (None, "logits"):
        raise KeyreduceError(f"--verify {verify} is unknown; the one that there is is logits")
    if verify:
        from keyreduce.pruning.masked import check_logits  # with transformers and fla, which take seconds to import
    console, workspace = Console(as_json=json), Workspace(work)
    chosen = method_named(method)
    run_on = pick_device(device)  # a wrong one is told even where nothing is left to calibrate
    cast_to, shard_bytes = dtype and dtype_named(dtype), max_shard_size and parse_size(max_shard_size)
    given = {"f": f, "permute": permute or None, "form": form, "include_queries": include_queries or None}
    given = {name: value for name, value in given.items() if value is not None}
    choices = check_options(chosen, given | read_options(chosen, set_ or ()))
    source = open_model(model, config=config)
    if dtype is None and source.shards is None:
        source.refuse_other_dtype()
    budget = Budget.parse(
        target, ratio=ratio, keep=keep, variance=variance, allocate=allocate, multiple_of=multiple_of
    )
    budget.check(source.config, chosen)
    check_method(source, chosen, budget.targets)
    if recover not in (None, *MODES):
        raise KeyreduceError(f"--recover {recover} is unknown; there are {' and '.join(MODES)}")
    if engine is not None and not budget.needs_statistics:
        check_engine(engine, source.config, budget.numbers(source.config, None, chosen, choices))
    words = text_source(text or (), dataset, dataset_config, split, default="calibration")
    given_text = {"text": text or (), "dataset": dataset, "dataset_config": dataset_config, "split": split}
    folder = output or workspace.pruned
    refuse_source(folder, Path(model) if model and os.path.isdir(model) else source.path)

    inputs = {
        "source": source.identity,
        "method": method,
        "options": choices,
        **budget.describe(source.config),
        "seed": seed,
        **({"dtype": dtype} if dtype else {}),
        **({"max_shard_size": shard_bytes} if shard_bytes else {}),
    }
    wanted = {"repairs": [[recover, words.identity]]} if recover else {}
    recorded = None if overwrite else recorded_inputs(folder)
    # What differs already is refused before calibration, which takes time and leaves a file.
    comparable = recorded and {name: value for name, value in recorded.items() if name != "calibration"}
    if not is_already_made(folder, comparable, inputs | wanted, overwrite):
        refuse_unwritable(folder, folder=True)
    statistics = None
    if chosen.needs_statistics or budget.needs_statistics:
        statistics = calibrated(
            console, model, config, source, given_text, calibration, workspace, device, gradients=chosen.needs_gradients
        )
        # Gradients leave the other sums as they are.
        without = () if chosen.needs_gradients else ("gradients",)
        inputs["calibration"] = {name: value for name, value in statistics.inputs.items() if name not in without}
    if is_already_made(folder, recorded, inputs | wanted, overwrite):
        console.say(f"{folder} is there already, from the same inputs")
        console.result({"pruned": str(folder), "made": False})
        return

    # It imports while channels are chosen and bytes are copied.
    with Skeleton() as skeleton, freed_tensors_returned():
        keeps = budget.numbers(source.config, statistics, chosen, choices)
        if engine is not None:
            check_engine(engine, source.config, keeps)
        with console.progress("selecting", len(next(iter(keeps.values()))), "layers") as progress:
            plan = make_plan(
                source,
                chosen,
                keeps,
                seed=seed,
                statistics=statistics,
                inputs=inputs,
                options=choices,
                progress=progress,
            )
        cut = folder if recover is None else folder.with_name(f".{folder.name}.unrepaired")
        with console.progress("writing", source.nbytes, "B") as progress:
            saved = write_pruned(
                source,
                plan,
                cut,
                dense=model_name(model),
                dense_config=config,
                dtype=cast_to,
                max_shard_size=shard_bytes,
                command=command_line(),
                skeleton=skeleton,
                verify=verify and (lambda made: check_logits(source, made, plan, device=run_on, seed=seed)),
                overwrite=overwrite or recover is not None,
                progress=progress,
            )
    repair = recover and repair_cut(words, cut, folder, mode=recover, device=run_on, seed=seed, overwrite=overwrite)
    report_cut(console, Path(model_name(model)).name, source, plan, saved, folder, repair=repair)

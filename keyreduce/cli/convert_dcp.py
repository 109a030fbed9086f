"""``keyreduce convert-dcp``: safetensors to torch distributed checkpoint, and back."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options

_LAYOUTS = ("auto", "flat", "nested")


def convert_dcp(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SRC",
            envvar="COMPRESSED_MODEL",
            help="Hugging Face folder, or DCP folder (or its parent, of which the latest step is taken).",
            show_default="what prune or recover wrote into --work",
        ),
    ] = None,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DST", help="Where to write.", show_default="dcp or hf in --work"),
    ] = None,
    work: options.Work = options.DEFAULT_WORK,
    config: options.Config = None,
    step: Annotated[int, typer.Option(min=0, help="A DCP is written into a folder step-N.")] = 0,
    layout: Annotated[
        str,
        typer.Option(
            metavar="auto|flat|nested",
            help="The model's names in a DCP: flat, as torchtitan has them now, or under 'model', as before. auto "
            "reads what is there, and writes what the weights came from, else flat.",
        ),
    ] = "auto",
    dtype: options.CastTo = None,
    max_shard_size: options.MaxShardSize = None,
    only_model: Annotated[
        bool,
        typer.Option(
            "--only-model/--no-only-model",
            help="Leave optimizer and training state out, which a Hugging Face folder cannot hold; or stop if there "
            "is any.",
        ),
    ] = True,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Convert a checkpoint; which way is read from what the source is."""
    from keyreduce.api.pair import latest
    from keyreduce.checkpoint.find import find_dcp, find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.writing import parse_size
    from keyreduce.cli.console import Console
    from keyreduce.devices import dtype_named
    from keyreduce.errors import KeyreduceError
    from keyreduce.pruning.prune import read_record
    from keyreduce.workspace import Workspace

    console, workspace = Console(as_json=json), Workspace(work)
    if layout not in _LAYOUTS:
        raise KeyreduceError(f"--layout {layout} is unknown; take one of {', '.join(_LAYOUTS)}")
    form = {
        "dtype": dtype and dtype_named(dtype),
        "max_shard_size": max_shard_size and parse_size(max_shard_size),
    }
    path = latest(workspace) if source is None else Path(source)
    if source is None and not path.is_dir():
        raise KeyreduceError(f"there is no pruned model at {path}; run keyreduce prune, or name a SRC")
    dcp = find_dcp(path) if os.path.isdir(path) else None
    if dcp is None:
        checkpoint = open_folder(find_model(str(path)))
        if layout == "auto":
            layout = read_record(checkpoint.path).get("dcp_layout", "flat")
        target = (destination or workspace.dcp) / f"step-{step}"
        _convert(console, checkpoint, target, to_dcp=True, layout=layout, overwrite=overwrite, **form)
        return
    from keyreduce.checkpoint.dcp_source import open_dcp

    checkpoint = open_dcp(dcp, config=config, layout=None if layout == "auto" else layout)
    if checkpoint.left_out and not only_model:
        raise KeyreduceError(
            f"{dcp} holds {checkpoint.left_out} entries beside the model, which a Hugging Face folder has no place for"
        )
    if dtype is None:
        checkpoint.refuse_other_dtype()
    target = destination or workspace.hf
    _convert(console, checkpoint, target, to_dcp=False, layout=checkpoint.layout, overwrite=overwrite, **form)


def _convert(console, source, target, *, to_dcp, layout, dtype, max_shard_size, overwrite) -> None:
    """Write one way or the other into ``target``, whole or not at all, and record what it was converted from."""
    from keyreduce.checkpoint.dcp import write_dcp
    from keyreduce.checkpoint.dcp_source import open_dcp
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.memory import freed_tensors_returned
    from keyreduce.checkpoint.rewrite import rewrite
    from keyreduce.cli.console import megabytes
    from keyreduce.errors import UnknownArchitecture
    from keyreduce.families.mixer_tensors import check_mixers
    from keyreduce.outputs import appearing, is_already_made, refuse_source, write_json
    from keyreduce.pruning.prune import read_record
    from keyreduce.workspace import RECORD_NAME

    refuse_source(target, source.path)
    inputs = {"source": source.identity, "layout": layout}
    inputs |= {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}
    inputs |= {"max_shard_size": max_shard_size} if max_shard_size else {}
    recorded = None if overwrite else read_record(target).get("converted")
    if is_already_made(target, recorded, inputs, overwrite):
        console.say(f"{target} is there already, from the same inputs")
        console.result({"converted": str(target), "made": False})
        return
    with (
        freed_tensors_returned(),
        console.progress("converting", source.nbytes, "B") as progress,
        appearing(target, folder=True, overwrite=overwrite) as folder,
    ):
        if to_dcp:
            write_dcp(source, folder, nested=layout == "nested", dtype=dtype, progress=progress)
        else:
            rewrite(source, folder, dtype=dtype, max_shard_size=max_shard_size, progress=progress)
        try:
            check_mixers(source.config, source.shapes, source.path)
        except UnknownArchitecture as error:
            console.note(f"not checked whether all tensors of the model are there: {error}")
        written = open_dcp(folder) if to_dcp else open_folder(folder)
        record = read_record(source.path) | {
            "dcp_layout": layout,
            "converted": inputs,
            "identity": written.identity,
        }
        write_json(folder / RECORD_NAME, record, overwrite=True)
    kind = f"a distributed checkpoint, {layout}," if to_dcp else "a Hugging Face folder"
    left_out = 0 if to_dcp else source.left_out
    console.say(
        f"wrote {target}: {kind} of {len(source.tensors)} tensors, {megabytes(source.nbytes)}, from {source.path}"
    )
    if left_out:
        console.say(f"left out: {left_out} entries of optimizer and training state")
    console.result({"converted": str(target), "made": True, "bytes": source.nbytes, "layout": layout})

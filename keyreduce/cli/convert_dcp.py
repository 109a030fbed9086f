"""``keyreduce convert-dcp``: safetensors to torch distributed checkpoint, and back."""

import os
from pathlib import Path
from typing import Annotated

import typer

from keyreduce.cli import options


def convert_dcp(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SRC",
            envvar="COMPRESSED_MODEL",
            help="Hugging Face folder, or DCP folder (or its parent, of which the latest step is taken).",
            show_default="what prune wrote into --work",
        ),
    ] = None,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="DST", help="Where to write.", show_default="dcp or hf in --work"),
    ] = None,
    work: options.Work = options.DEFAULT_WORK,
    config: Annotated[
        Path | None,
        typer.Option(help="For a DCP without one: the model's config.json, or a folder that holds it."),
    ] = None,
    step: Annotated[int, typer.Option(min=0, help="A DCP is written into a folder step-N.")] = 0,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The most bytes in a safetensors shard of several tensors: 500MB, 5GB.")
    ] = "5GB",
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Convert a checkpoint; which way is read from what the source is."""
    from keyreduce.checkpoint.dcp_folder import find_dcp
    from keyreduce.checkpoint.folder import parse_size
    from keyreduce.cli.console import Console
    from keyreduce.errors import KeyreduceError
    from keyreduce.workspace import Workspace

    console, workspace = Console(as_json=json), Workspace(work)
    shard_bytes = parse_size(max_shard_size)
    if source is None and not workspace.pruned.is_dir():
        raise KeyreduceError(f"there is no pruned model at {workspace.pruned}; run keyreduce prune, or name a SRC")
    path = workspace.pruned if source is None else Path(source)
    dcp = find_dcp(path) if os.path.isdir(path) else None
    if dcp is None:
        _to_dcp(console, path, (destination or workspace.dcp) / f"step-{step}", overwrite)
    else:
        _to_hf(console, dcp, destination or workspace.hf, config, shard_bytes, overwrite)


def _to_dcp(console, path, target, overwrite) -> None:
    from keyreduce.checkpoint.dcp import hf_to_dcp
    from keyreduce.checkpoint.find import find_model
    from keyreduce.checkpoint.folder import open_folder

    checkpoint = open_folder(find_model(str(path)))
    size = sum(entry.end - entry.begin for _, entry in checkpoint.entries.values())
    _convert(
        console,
        checkpoint.path,
        target,
        f"a distributed checkpoint of {len(checkpoint.entries)} tensors",
        {"source": checkpoint.identity},
        size,
        overwrite,
        lambda folder, progress: hf_to_dcp(checkpoint, folder, progress=progress),
    )


def _to_hf(console, dcp, target, config, shard_bytes, overwrite) -> None:
    from keyreduce.checkpoint.dcp import dcp_to_hf
    from keyreduce.checkpoint.dcp_folder import identify_dcp

    _convert(
        console,
        dcp,
        target,
        "a Hugging Face folder",
        {"source": identify_dcp(dcp), "config": str(config) if config else None, "max_shard_size": shard_bytes},
        sum(file.stat().st_size for file in dcp.glob("*.distcp")),
        overwrite,
        lambda folder, progress: dcp_to_hf(
            dcp, folder, config=config, max_shard_size=shard_bytes, progress=progress
        ),
    )


def _convert(console, source, target, kind, inputs, size, overwrite, write) -> None:
    """Write one way or the other into ``target``, whole or not at all, and record what it was converted from."""
    from keyreduce.cli.console import megabytes
    from keyreduce.workspace import RECORD_NAME, appearing, is_already_made, read_json, refuse_source, write_json

    def record_of(folder: Path) -> dict:
        return read_json(folder / RECORD_NAME) if (folder / RECORD_NAME).is_file() else {}

    refuse_source(target, source)
    recorded = None if overwrite else record_of(target).get("converted")
    if is_already_made(target, recorded, inputs, overwrite):
        console.say(f"{target} is there already, from the same inputs")
        console.result({"converted": str(target), "made": False})
        return
    with (
        console.progress("converting", size, "B") as progress,
        appearing(target, folder=True, overwrite=overwrite) as folder,
    ):
        write(folder, progress)
        write_json(folder / RECORD_NAME, {**record_of(folder), "converted": inputs}, overwrite=True)
    console.say(f"wrote {target}: {kind}, {megabytes(size)}")
    console.result({"converted": str(target), "made": True, "bytes": size})

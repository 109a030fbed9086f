"""Safetensors to torch distributed checkpoint (DCP), and back."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeGuard

from keyreduce.api import options
from keyreduce.api.request import Result, option
from keyreduce.errors import KeyreduceError, UnknownArchitecture
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    from keyreduce.checkpoint.dcp_source import DcpCheckpoint
    from keyreduce.checkpoint.source import Checkpoint

_ALGORITHM = 1  # to be raised when what is written changes


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(options.AfterPrune):
    """Convert a checkpoint; which way is read from what the source is."""

    source: str | None = option(
        None,
        help="Hugging Face folder, or DCP folder (or its parent, of which the latest step is taken).",
        metavar="SRC",
        env="COMPRESSED_MODEL",
        is_argument=True,
        shown_default="what prune or recover wrote into --work",
    )
    destination: Path | None = option(
        None, help="Where to write.", metavar="DST", is_argument=True, shown_default="dcp or hf in --work"
    )
    config: Path | None = options.config()
    step: int = option(0, help="A DCP is written into a folder step-N.", minimum=0)
    layout: Literal["auto", "flat", "nested"] = option(
        "auto",
        help="The model's names in a DCP: flat, as torchtitan has them now, or under 'model', as before. auto "
        "reads what is there, and writes what the weights came from, else flat.",
    )
    dtype: options.Dtype | None = options.cast_to()
    max_shard_size: str | None = options.max_shard_size()
    only_model: bool = option(
        True,
        help="Leave optimizer and training state out, which a Hugging Face folder cannot hold; or stop if there is "
        "any.",
    )
    push_to_hub: str | None = options.push_to_hub()
    overwrite: bool = option(False, help="Replace what is at DST.")


@dataclass(frozen=True, kw_only=True)
class ConvertResult(Result):
    """A converted checkpoint.

    Attributes:
        converted: its folder.
        made: whether this run made it; else it was there already, from the same inputs.
        source: the folder that it was made from.
        bytes: the size of the source's tensors.
        tensors: how many they are.
        layout: how the names in the DCP, which is the source or the result, are laid out.
        is_dcp: whether the result is a DCP.
        left_out: how many entries of optimizer and training state are not in the result.
        pushed: the address on the hub that it was uploaded to, if that was asked for.
    """

    converted: Path
    made: bool
    source: Path
    bytes: int
    tensors: int
    layout: str
    is_dcp: bool
    left_out: int
    pushed: str | None = None


def run(request: ConvertRequest, reporter: Reporter = Reporter()) -> ConvertResult:
    """Convert a checkpoint, or leave the one that was made from the same inputs.

    Raises:
        KeyreduceError: there is no such checkpoint, it is damaged, or holds what a Hugging Face folder has no place
            for; or the result is there from other inputs, or cannot be written.
    """
    from keyreduce.checkpoint.hub import push_to_hub
    from keyreduce.checkpoint.record import Record
    from keyreduce.checkpoint.writing import parse_size
    from keyreduce.outputs import claimed, is_already_made, refuse_source

    max_shard_size = request.max_shard_size and parse_size(request.max_shard_size)
    source, layout = _open(request)
    target = _target(request, source)
    refuse_source(target, source.path)
    inputs = {"algorithm": _ALGORITHM, "source": source.identity, "layout": layout}
    inputs |= {"dtype": request.dtype} if request.dtype else {}
    inputs |= {"max_shard_size": max_shard_size} if max_shard_size else {}
    with claimed(target, folder=True):
        recorded = None if request.overwrite else Record.read(target).converted
        made = not is_already_made(target, recorded and recorded["inputs"], inputs, request.overwrite)
        if made:
            _convert(source, target, inputs, overwrite=request.overwrite, reporter=reporter)
    return ConvertResult(
        converted=target,
        made=made,
        source=source.path,
        bytes=source.nbytes,
        tensors=len(source.tensors),
        layout=layout,
        is_dcp=not _is_dcp(source),
        left_out=source.left_out if _is_dcp(source) else 0,
        pushed=request.push_to_hub and push_to_hub(target, request.push_to_hub),
    )


def _is_dcp(source: "Checkpoint") -> "TypeGuard[DcpCheckpoint]":
    from keyreduce.checkpoint.dcp_source import DcpCheckpoint

    return isinstance(source, DcpCheckpoint)


def _open(request: ConvertRequest) -> "tuple[Checkpoint, str]":
    """Return the source, and the layout of the DCP that it is or is to become."""
    from keyreduce.api.pair import latest
    from keyreduce.checkpoint.dcp_source import open_dcp
    from keyreduce.checkpoint.find import find_dcp, find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.record import Record

    path = latest(request.workspace) if request.source is None else Path(request.source)
    if request.source is None and not path.is_dir():
        raise KeyreduceError(f"there is no pruned model at {path}; run keyreduce prune, or name a `source`")
    dcp = find_dcp(path) if os.path.isdir(path) else None
    if dcp is None:
        folder = open_folder(find_model(str(path)))
        found = Record.read(folder.path).dcp_layout or "flat"
        return folder, found if request.layout == "auto" else request.layout
    source = open_dcp(dcp, config=request.config, layout=None if request.layout == "auto" else request.layout)
    if source.left_out and not request.only_model:
        raise KeyreduceError(
            f"{dcp} holds {source.left_out} entries beside the model, which a Hugging Face folder has no place for"
        )
    if request.dtype is None:
        source.refuse_other_dtype()
    return source, source.layout


def _target(request: ConvertRequest, source: "Checkpoint") -> Path:

    workspace = request.workspace
    return (
        (request.destination or workspace.hf)
        if _is_dcp(source)
        else ((request.destination or workspace.dcp) / f"step-{request.step}")
    )


def _convert(source: "Checkpoint", target: Path, inputs: dict, *, overwrite: bool, reporter: Reporter) -> None:
    """Write one way or the other into ``target``, whole or not at all, and record what it was converted from."""
    from keyreduce.checkpoint.card import read_card, write_record
    from keyreduce.checkpoint.dcp import write_dcp
    from keyreduce.checkpoint.dcp_source import open_dcp
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.memory import freed_tensors_returned
    from keyreduce.checkpoint.record import Record
    from keyreduce.checkpoint.rewrite import rewrite
    from keyreduce.devices import dtype_named
    from keyreduce.families.mixer_tensors import check_mixers
    from keyreduce.outputs import appearing
    from keyreduce.processes import command_line

    dtype, size = dtype_named(inputs["dtype"]) if "dtype" in inputs else None, inputs.get("max_shard_size")
    with (
        freed_tensors_returned(),
        reporter.progress("converting", source.nbytes, "B") as progress,
        appearing(target, folder=True, overwrite=overwrite) as folder,
    ):
        if _is_dcp(source):
            checksums = rewrite(source, folder, dtype=dtype, max_shard_size=size, progress=progress)
        else:
            is_nested = inputs["layout"] == "nested"
            checksums = write_dcp(source, folder, dtype=dtype, nested=is_nested, progress=progress)
        try:
            check_mixers(source.config, source.shapes, source.path)
        except UnknownArchitecture as error:
            reporter.note(f"not checked whether all tensors of the model are there: {error}")
        written = open_folder(folder) if _is_dcp(source) else open_dcp(folder)
        record = Record.read(source.path).with_conversion(inputs, layout=inputs["layout"], command=command_line())
        write_record(written, record, checksums, read_card(source.path))

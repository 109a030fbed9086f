"""Safetensors to torch distributed checkpoint (DCP), and back."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from keyreduce.api import options
from keyreduce.api.request import Result, option
from keyreduce.errors import KeyreduceError
from keyreduce.reporting import Reporter

if TYPE_CHECKING:
    from keyreduce.checkpoint.source import Checkpoint

_ALGORITHM = 1  # to be raised when what is written changes


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(options.AfterPrune, options.OfFiles):
    """Convert a checkpoint; the direction follows from what the source is."""

    source: str | None = option(
        None,
        "Hugging Face folder, or DCP folder (or its parent, of which the latest step is taken).",
        is_argument=True,
        **options.COMPRESSED | {"metavar": "SRC"},
    )
    destination: Path | None = option(
        None, "Where to write.", metavar="DST", is_argument=True, shown_default="dcp or hf in --work", **options.OUTPUT
    )
    config: Path | None = options.config()
    step: int = option(0, "A DCP is written into a folder step-N.", minimum=0)
    layout: Literal["auto", "flat", "nested"] = option(
        "auto",
        "The model's names in a DCP: flat, as torchtitan has them now, or under 'model', as before. auto "
        "reads what is there, and writes what the weights came from, else flat.",
    )
    only_model: bool = option(
        True, "Leave out optimizer and training state, for which a Hugging Face folder has no place; else stop at it."
    )
    overwrite: bool = option(False, "Replace what is at DST.", **options.OUTPUT)


@dataclass(frozen=True, kw_only=True)
class ConvertResult(Result):
    """A converted checkpoint."""

    converted: Path  # its folder.
    made: bool  # whether this run made it; else it was there already, from the same inputs.
    source: Path  # the folder that it was made from.
    bytes: int  # the size of the source's tensors.
    tensors: int  # how many they are.
    layout: str  # how the names in the DCP, which is the source or the result, are laid out.
    is_dcp: bool  # whether the result is a DCP.
    left_out: int  # how many entries of optimizer and training state are not in the result.
    pushed: str | None = None  # the address on the hub that it was uploaded to, if that was asked for.


def run(request: ConvertRequest, reporter: Reporter = Reporter()) -> ConvertResult:
    """Convert a checkpoint, or leave the one that was made from the same inputs.

    Raises:
        KeyreduceError: there is no such checkpoint, it is damaged, or holds what a Hugging Face folder has no place
            for; or the result is there from other inputs, or cannot be written.
    """
    from keyreduce.checkpoint.dcp_source import DcpCheckpoint
    from keyreduce.checkpoint.record import Record
    from keyreduce.outputs import appearing, claimed, is_already_made, refuse_source

    files = request.file_settings
    source, layout = _open(request)
    from_dcp = isinstance(source, DcpCheckpoint)
    if from_dcp:
        target = request.destination or request.workspace.hf
    else:
        target = (request.destination or request.workspace.dcp) / f"step-{request.step}"
    refuse_source(target, source.path)
    inputs = {"algorithm": _ALGORITHM, "source": source.identity, "layout": layout, **files}
    with claimed(target, folder=True):
        recorded = None if request.overwrite else Record.read(target).converted
        made = not is_already_made(target, recorded and recorded["inputs"], inputs, request.overwrite)
        if made:
            with appearing(target, folder=True, overwrite=request.overwrite) as folder:
                _convert(source, folder, inputs, reporter, from_dcp=from_dcp)
    return ConvertResult(
        converted=target,
        made=made,
        source=source.path,
        bytes=source.nbytes,
        tensors=len(source.tensors),
        layout=layout,
        is_dcp=not from_dcp,
        left_out=source.left_out if isinstance(source, DcpCheckpoint) else 0,
        pushed=request.pushed(target),
    )


def _open(request: ConvertRequest) -> "tuple[Checkpoint, str]":
    """Return the source, and the layout of the DCP that it is or is to become."""
    from keyreduce.api.pair import latest
    from keyreduce.checkpoint.dcp_source import DcpCheckpoint
    from keyreduce.checkpoint.find import find_dcp, find_model
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.record import Record

    path = Path(request.source) if request.source is not None else latest(request.workspace, "a `source`")
    dcp = find_dcp(path) if os.path.isdir(path) else None
    if dcp is None:
        folder = open_folder(find_model(str(path)))
        found = Record.read(folder.path).dcp_layout or "flat"
        return folder, found if request.layout == "auto" else request.layout
    source = DcpCheckpoint(dcp, config=request.config, layout=None if request.layout == "auto" else request.layout)
    if source.left_out and not request.only_model:
        raise KeyreduceError(
            f"{dcp} holds {source.left_out} entries beside the model, which a Hugging Face folder has no place for"
        )
    if request.dtype is None:
        source.refuse_other_dtype()
    return source, source.layout


def _convert(source: "Checkpoint", folder: Path, inputs: dict, reporter: Reporter, *, from_dcp: bool) -> None:
    """Write one way or the other into ``folder``, and record what it was converted from."""
    from keyreduce.api.verify import check_tensors
    from keyreduce.checkpoint.card import read_card, write_record
    from keyreduce.checkpoint.dcp import write_dcp
    from keyreduce.checkpoint.dcp_source import DcpCheckpoint
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.checkpoint.memory import freed_tensors_returned
    from keyreduce.checkpoint.record import Record
    from keyreduce.checkpoint.rewrite import rewrite
    from keyreduce.devices import dtype_named
    from keyreduce.processes import command_line

    check_tensors(source, reporter, load=False)
    dtype, size = dtype_named(inputs["dtype"]) if "dtype" in inputs else None, inputs.get("max_shard_size")
    with freed_tensors_returned(), reporter.progress("converting", source.nbytes, "B") as progress:
        if from_dcp:
            checksums = rewrite(source, folder, dtype=dtype, max_shard_size=size, progress=progress)
        else:
            is_nested = inputs["layout"] == "nested"
            checksums = write_dcp(source, folder, dtype=dtype, nested=is_nested, progress=progress)
        written = open_folder(folder) if from_dcp else DcpCheckpoint(folder)
        record = Record.read(source.path).with_conversion(inputs, layout=inputs["layout"], command=command_line())
        write_record(written, record, checksums, read_card(source.path))

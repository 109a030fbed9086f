"""Text and a model to a calibration file."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from keyreduce.api import options
from keyreduce.api.request import Result, option
from keyreduce.reporting import Reporter


@dataclass(frozen=True, kw_only=True)
class CalibrateRequest(options.OfRun, options.OfText):
    """Run text through the model and keep statistics: one small file, for every method and every ratio.

    A run that was stopped resumes where it was: sums are kept beside the output every minute. Under torchrun the
    processes divide the batches.
    """

    model: str | None = options.model()
    work: Path = options.work()
    output: Path | None = options.output("The calibration file.", metavar="FILE")
    num_batches: int = options.num_batches(16)
    batch_size: int = options.batch_size(4)
    seq_len: int = options.seq_len(512)
    gradients: bool = option(False, "Add what prune --method taylor needs; about three times slower.")
    offload: Literal["disk", "cpu", "auto"] | None = option(
        None,
        "Where layers wait for their turn on the device (needs accelerate); auto fills all devices first.",
        shown_default="the whole model on the device",
    )
    config: Path | None = options.config()
    dtype: options.Dtype | None = options.dtype()


@dataclass(frozen=True, kw_only=True)
class CalibrateResult(Result):
    """A calibration file."""

    calibration: Path  # the file.
    made: bool  # whether this run made it; else it was there already, from the same inputs.
    model: Path  # the folder of the model.
    tokens: int  # how many tokens the statistics are over.
    layers: int  # how many layers have statistics.
    gradients: bool  # whether those of gradients are among them.
    bytes: int  # the size of the file.


def run(request: CalibrateRequest, reporter: Reporter = Reporter()) -> CalibrateResult | None:
    """Make the calibration file, or leave the one that was made from the same inputs.

    Returns:
        The result; None in all processes of torchrun but the first.

    Raises:
        KeyreduceError: there is no such model, no table knows its type or it is damaged, the text is empty, or the
            file is there from other inputs, or cannot be written.
    """
    from keyreduce.calibration.file import read_record, read_statistics, write_statistics
    from keyreduce.calibration.partial import PartialSums
    from keyreduce.calibration.run import Settings, calibrate, describe_inputs
    from keyreduce.checkpoint.find import find_model, model_name
    from keyreduce.checkpoint.folder import open_folder
    from keyreduce.devices import pick_device, pick_dtype
    from keyreduce.families import family_of
    from keyreduce.outputs import claimed, is_already_made
    from keyreduce.processes import Processes
    from keyreduce.workspace import Workspace

    processes = Processes.of_torchrun()
    settings = Settings(request.num_batches, request.batch_size, request.seq_len, request.seed)
    settings.check(gradients=request.gradients)
    text = request.text_source("calibration")
    source = open_folder(find_model(request.model, config=request.config))
    family_of(source.config)
    device = pick_device(processes.device(request.device))
    dtype = pick_dtype(request.dtype, device)
    inputs = describe_inputs(source, text, settings, dtype, gradients=request.gradients)
    target = request.output or Workspace(request.work).calibration
    with claimed(target, folder=False, by_this_process=processes.rank == 0):
        recorded = read_record(target)["inputs"] if os.path.exists(target) and not request.overwrite else None
        if recorded and recorded.get("gradients") and not request.gradients:
            recorded = {**recorded, "gradients": False}  # it holds all that is asked for, and more
        made = not is_already_made(target, recorded, inputs, request.overwrite)
        if made:
            how = f"{inputs['dtype']}, with gradients" if request.gradients else inputs["dtype"]
            reporter.note(f"calibrating {Path(model_name(request.model)).name} on {device} ({how})")
            kept = PartialSums(target, inputs, device, processes, reporter.note, reporter.keep)
            with reporter.progress("calibrating", settings.tokens // processes.number, "tokens") as progress:
                where: dict[str, Any] = {"device": device, "dtype": dtype, "offload": request.offload}
                where |= {"processes": processes, "progress": progress, "note": reporter.note}
                where |= {"partial_sums": kept}
                statistics = calibrate(source, text, settings, gradients=request.gradients, **where)
            if processes.rank == 0:
                write_statistics(statistics, target, overwrite=request.overwrite)
            kept.clear()
    if processes.rank:
        return None
    statistics = read_statistics(target)
    return CalibrateResult(
        calibration=target,
        made=made,
        model=source.path,
        tokens=statistics.tokens,
        layers=len(statistics.layers),
        gradients=bool(statistics.inputs.get("gradients")),
        bytes=target.stat().st_size,
    )

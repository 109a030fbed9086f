"""What test_shared_sums.py lets torchrun start: each process calibrates on its share, and writes what all have.

Every process is stopped after its first batch, and goes on from the sums that it kept.
"""

import sys
from pathlib import Path

import fla_torch

fla_torch.enable()

import torch

from keyreduce.calibration import partial
from keyreduce.calibration.file import write_statistics
from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import text_source
from keyreduce.processes import Processes

model, text, target = map(Path, sys.argv[1:4])
processes = Processes.of_torchrun()
device = torch.device(processes.device(sys.argv[4]))
partial.EVERY_SECONDS = 0


class Stopped(Exception):
    pass


class Stopping(partial.PartialSums):
    def keep_if_due(self, *arguments):
        super().keep_if_due(*arguments)
        raise Stopped


def run(kind: type[partial.PartialSums]):
    notes = []
    kept = kind(target / "shared", {}, device, processes, notes.append, notes.append)
    found = calibrate(
        open_folder(model), text_source((text,), None, None, None, default="calibration"),
        Settings(num_batches=5, batch_size=2, seq_len=24), device=device,
        dtype=torch.float32, gradients=True, processes=processes, partial_sums=kept,
    )  # fmt: skip
    kept.clear()
    assert processes.rank or "resuming after the 48 tokens of a run that was stopped" in notes
    return found


try:
    run(Stopping)
except Stopped:
    # The first process removes the sums of all, but not before all have added theirs up.
    assert (target / f".shared.sums-{processes.rank}-of-{processes.number}").exists()
    write_statistics(run(partial.PartialSums), target / str(processes.rank), overwrite=False)

"""What test_shared_sums.py lets torchrun start: each process calibrates on its share, and writes what all have."""

import sys
from pathlib import Path

import fla_torch

fla_torch.enable()

import torch

from keyreduce.calibration.file import write_statistics
from keyreduce.calibration.run import Settings, calibrate
from keyreduce.checkpoint.folder import open_folder
from keyreduce.data.text import text_source
from keyreduce.processes import Processes

model, text, target = map(Path, sys.argv[1:4])
processes = Processes.of_torchrun()
statistics = calibrate(
    open_folder(model), text_source((text,), None, None, None, default="calibration"),
    Settings(num_batches=5, batch_size=2, seq_len=24), device=torch.device(processes.device(sys.argv[4])),
    dtype=torch.float32, gradients=True, processes=processes,
)  # fmt: skip
write_statistics(statistics, target / str(processes.rank), overwrite=False)

"""What test_shared_sums.py lets torchrun start: each process has sums of its own, and writes down what all have."""

import sys
from pathlib import Path

import torch

from keyreduce.calibration.shared import add_up
from keyreduce.calibration.statistics import LayerStatistics
from keyreduce.evaluation.processes import Processes
from keyreduce.families import MixerSizes

rank = Processes.of_torchrun().rank
layers = {layer: LayerStatistics.zeros(3, MixerSizes(1, 2, 2, 2), torch.device("cpu")) for layer in (4, 0)}
for layer, statistics in layers.items():
    for tensor in statistics.tensors().values():
        tensor += 10**rank * (1 + layer)
added, tokens = add_up(layers, 100 * (rank + 1))
numbers = {layer: {tensor.unique().item() for tensor in sums.tensors().values()} for layer, sums in added.items()}
(Path(sys.argv[1]) / str(rank)).write_text(f"{tokens} {numbers}")

"""What test_processes.py lets torchrun start: the second process fails, and each writes down how it ends."""

import sys
from pathlib import Path

import torch

from keyreduce.errors import KeyreduceError
from keyreduce.processes import Processes

processes = Processes.of_torchrun()


def work() -> dict:
    if processes.rank == 1:
        raise KeyreduceError("the disk is made of cheese")
    return {"found": 1}


try:
    told = str(processes.gather(work))
except KeyreduceError as error:
    told = f"raised: {error}"
except SystemExit as exit_:
    told = f"exit: {exit_.code}"
try:
    with processes.adding() as add:
        if processes.rank:
            raise RuntimeError("ends early")
        add(torch.ones(3))
except (KeyreduceError, RuntimeError) as error:
    told += f"\n{error}"
(Path(sys.argv[1]) / str(processes.rank)).write_text(told)

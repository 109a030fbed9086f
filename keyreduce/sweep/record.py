"""The record of a sweep, and what else is in its folder.

sweep.json                 what is compared, on what text, and the list of runs
calibration/, dense/, runs/
    NAME-HASH/             a run: a task of keyreduce.api.tasks, with its log and its result
        keyreduce.json     the record of a pruned model
logs/                      what the processes printed beside the logs of the runs
table.md, .csv, .tex, .html, perplexity.png, pareto.png
"""

from pathlib import Path

from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json

SWEEP_NAME = "sweep.json"


def read_sweep(root: Path) -> dict:
    """Return the record of a sweep.

    Raises:
        KeyreduceError: ``root`` is not the folder of a sweep, or its record is damaged.
    """
    path = Path(root) / SWEEP_NAME
    if not path.is_file():
        raise KeyreduceError(f"{root} holds no {SWEEP_NAME}; give the folder that keyreduce sweep has written")
    record = read_json(path)
    runs = record.get("runs")
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "folder" in run for run in runs):
        raise KeyreduceError(f"{path} is damaged: it lists no runs; run keyreduce sweep again")
    return record

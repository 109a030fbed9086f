"""The files of a sweep's folder, by name, and what is read from them.

sweep.json                 what is compared, on what text, and the list of runs
calibration/, dense/, runs/
    NAME-HASH/             a run
        task.json          what it is to do
        log.txt            what its commands said
        result.json        what came out of each step; written last, so that the run is done where it is there
        failure.json       why there is no result.json
        keyreduce.json     the plan, of a pruned model
table.md, .csv, .tex, .html, perplexity.png, pareto.png
"""

from pathlib import Path

from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json

SWEEP_NAME = "sweep.json"
TASK_NAME = "task.json"
LOG_NAME = "log.txt"
RESULT_NAME = "result.json"
FAILURE_NAME = "failure.json"


def is_done(folder: Path) -> bool:
    """Return whether a run has its result."""
    return (folder / RESULT_NAME).is_file()


def failure_of(folder: Path) -> str | None:
    """Return why a run failed; None where it did not."""
    path = folder / FAILURE_NAME
    return str(read_json(path).get("message", "")) if path.is_file() else None


def read_sweep(root: Path) -> dict:
    """Return the record of a sweep.

    Raises:
        KeyreduceError: ``root`` is no folder of a sweep, or its record is damaged.
    """
    path = Path(root) / SWEEP_NAME
    if not path.is_file():
        raise KeyreduceError(f"{root} holds no {SWEEP_NAME}; give the folder that keyreduce sweep has written")
    record = read_json(path)
    runs = record.get("runs")
    if not isinstance(runs, list) or not all(isinstance(run, dict) and "folder" in run for run in runs):
        raise KeyreduceError(f"{path} is damaged: it lists no runs; run keyreduce sweep again")
    return record

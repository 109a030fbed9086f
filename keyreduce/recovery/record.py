"""What the record of a checkpoint says of its recoveries. Nothing heavy is imported here."""

from pathlib import Path

from keyreduce.errors import KeyreduceError
from keyreduce.outputs import read_json
from keyreduce.workspace import RECORD_NAME


def read_repairs(folder: Path) -> list[dict]:
    """Return what a checkpoint folder records of its recoveries, oldest first.

    Raises:
        KeyreduceError: the record is damaged.
    """
    path = folder / RECORD_NAME
    repairs = (read_json(path) if path.is_file() else {}).get("repairs", [])
    are_objects = isinstance(repairs, list) and all(isinstance(one, dict) for one in repairs)
    if not are_objects or not all(isinstance(one.get("inputs"), dict) for one in repairs):
        raise KeyreduceError(f"{path} is damaged: it does not say what was recovered; remove it, or prune again")
    return repairs

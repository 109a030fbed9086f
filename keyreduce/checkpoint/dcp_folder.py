"""Where a distributed checkpoint (DCP) is, and which one it is: what one can know without torch's DCP code."""

import hashlib
import re
from pathlib import Path

from keyreduce.checkpoint.folder import sample_blocks

METADATA_NAME = ".metadata"


def find_dcp(path: Path) -> Path | None:
    """Return the distributed checkpoint at ``path``, or None.

    It is the folder itself where that holds one, else its complete ``step-N`` of the highest N. DCP writes
    ``.metadata`` last: a step without it is one whose writing did not end.
    """
    path = Path(path)
    if (path / METADATA_NAME).is_file():
        return path
    steps = [
        (int(match[1]), child)
        for child in path.glob("step-*")
        if (match := re.fullmatch(r"step-(\d+)", child.name)) and (child / METADATA_NAME).is_file()
    ]
    return max(steps, default=(0, None))[1]


def identify_dcp(folder: Path) -> str:
    """Return a SHA-256, in hex, by which to tell the checkpoint in ``folder`` from another one.

    It covers ``.metadata`` and sampled blocks of each data file, as ``Checkpoint.identity`` does of a shard.
    """
    digest = hashlib.sha256((folder / METADATA_NAME).read_bytes())
    for path in sorted(folder.glob("*.distcp")):
        digest.update(path.name.encode())
        for block in sample_blocks(path, 0):
            digest.update(block)
    return digest.hexdigest()

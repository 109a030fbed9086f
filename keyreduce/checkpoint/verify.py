"""A checkpoint read to the last byte: is every value finite, and are the files those whose sums were noted?"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import xxhash

from keyreduce.checkpoint.checksums import feed
from keyreduce.checkpoint.record import Record
from keyreduce.checkpoint.rewrite import is_finite
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import appearing

SUMS_NAME = "SHA256SUMS"


def check_finite(source: Checkpoint, *, progress: Callable[[int], None] | None = None) -> None:
    """Read every tensor; ``progress`` is called after each with the number of its bytes.

    Raises KeyreduceError if a tensor cannot be read, or holds NaN or inf.
    """
    for name, spec in source.tensors.items():
        tensor = source.read(name)
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if spec.bits == 8 and tensor.is_floating_point():
            tensor = tensor.float()  # no kernel compares numbers of 8 bits; those of 4 have no NaN
        if spec.bits >= 8 and tensor.is_floating_point() and not is_finite(tensor):
            raise KeyreduceError(f"tensor {name!r} of {source.path} holds NaN or inf: the checkpoint is damaged")
        if progress is not None:
            progress(spec.nbytes)


def hash_files(source: Checkpoint, record: Record, *, progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """Hash every file that holds tensors, and compare it with the checksum that was taken when it was written.

    Args:
        source: the checkpoint.
        record: its record; one of version 0.1, or of a model that keyreduce did not write, has no checksums.
        progress: called after each piece of a file with the number of its bytes.

    Returns:
        File name -> SHA-256 in hex, as ``sha256sum`` has it.

    Raises KeyreduceError if a file cannot be read, a byte of it changed, or it is another one.
    """
    sums = {}
    for path in source.files:
        cryptographic, fast = hashlib.sha256(), xxhash.xxh3_128()
        told = [] if progress is None else [lambda piece: progress(len(piece))]
        feed(path, cryptographic.update, fast.update, *told)
        if record.checksums is not None and record.checksums.get(path.name) != fast.hexdigest():
            raise KeyreduceError(f"{path} is not what was written: it was changed since, or damaged; get it again")
        sums[path.name] = cryptographic.hexdigest()
    return sums


def compare_sums(folder: Path, found: Mapping[str, str]) -> bool:
    """Compare file name -> SHA-256 with the folder's ``SHA256SUMS``; return whether it has one.

    Raises KeyreduceError if one differs or was not noted, or the file is not what ``sha256sum`` writes.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return False
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
        noted = {name.lstrip("*"): digest for digest, name in lines}
    except (OSError, ValueError):
        raise KeyreduceError(f"{path} is not what sha256sum writes; remove it, or get it again") from None
    for name, digest in found.items():
        if noted.get(name) != digest:
            what = "differs from" if name in noted else "is not in"
            raise KeyreduceError(f"{folder / name} {what} {SUMS_NAME}: the checkpoint is damaged, or not the same one")
    return True


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write file name -> SHA-256 into the folder, as ``SHA256SUMS``. Raises KeyreduceError if it cannot be written."""
    with appearing(folder / SUMS_NAME, folder=False, overwrite=True) as temporary:
        temporary.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))

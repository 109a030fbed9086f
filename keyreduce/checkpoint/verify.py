"""A checkpoint read to the last byte: is every value finite, and are the files those whose sums were noted?"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from keyreduce.checkpoint.checksums import checksum
from keyreduce.checkpoint.record import Record
from keyreduce.checkpoint.rewrite import is_finite
from keyreduce.checkpoint.source import Checkpoint
from keyreduce.errors import KeyreduceError
from keyreduce.outputs import appearing

SUMS_NAME = "SHA256SUMS"


def check_finite(source: Checkpoint, *, progress: Callable[[int], None] | None = None) -> None:
    """Read every tensor.

    Args:
        source: the checkpoint.
        progress: called after each tensor with the number of its bytes.

    Raises:
        KeyreduceError: a tensor cannot be read, or holds NaN or inf.
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


def check_sums(source: Checkpoint, record: Record, *, progress: Callable[[int], None] | None = None) -> bool:
    """Hold every file that holds weights against the checksum that was taken when it was written.

    Args:
        source: the checkpoint.
        record: its record.
        progress: called after each piece of a file with the number of its bytes.

    Returns:
        Whether there was anything to compare: a record of version 0.1, or of a model that keyreduce did not write, has
        no checksums.

    Raises:
        KeyreduceError: a file cannot be read, a byte of it changed, or it is another one.
    """
    if record.checksums is None:
        return False
    for path in source.files:
        if record.checksums.get(path.name) != checksum(path, progress):
            raise KeyreduceError(f"{path} is not what was written: it was changed since, or damaged; get it again")
    return True


def hash_files(source: Checkpoint, *, progress: Callable[[int], None] | None = None) -> dict[str, str]:
    """Return file name -> SHA-256, in hex, of every file that holds tensors, as ``sha256sum`` has them.

    Raises:
        KeyreduceError: a file cannot be read.
    """
    sums = {}
    for path in source.files:
        try:
            with open(path, "rb") as file:
                sums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
                size = file.tell()
        except OSError as error:
            raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
        if progress is not None:
            progress(size)
    return sums


def read_sums(folder: Path) -> dict[str, str] | None:
    """Return file name -> SHA-256 as the folder's ``SHA256SUMS`` has them, or None if it has no such file.

    Raises:
        KeyreduceError: it is not what ``sha256sum`` writes.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return None
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
        return {name.lstrip("*"): digest for digest, name in lines}
    except (OSError, ValueError):
        raise KeyreduceError(f"{path} is not what sha256sum writes; remove it, or get it again") from None


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write file name -> SHA-256 into the folder, as ``SHA256SUMS``.

    Raises:
        KeyreduceError: it cannot be written.
    """
    with appearing(folder / SUMS_NAME, folder=False, overwrite=True) as temporary:
        temporary.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def compare_sums(folder: Path, found: dict[str, str], noted: dict[str, str]) -> None:
    """Refuse files whose bytes are not those that were noted.

    Raises:
        KeyreduceError: one differs, or was not noted.
    """
    for name, digest in found.items():
        if noted.get(name) != digest:
            what = "differs from" if name in noted else "is not in"
            raise KeyreduceError(f"{folder / name} {what} {SUMS_NAME}: the checkpoint is damaged, or another one")

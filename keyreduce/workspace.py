"""Where the commands find each other's files, and how a file or folder appears whole or not at all."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from keyreduce.errors import KeyreduceError

RECORD_NAME = "keyreduce.json"
PROJECTIONS_NAME = "keyreduce.npz"

_CANNOT_WRITE = (errno.EACCES, errno.EDQUOT, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM, errno.EROFS)


class Workspace:
    """The work folder: each command's default output, which is the next command's default input.

    Args:
        root: the folder (``--work``, ``KEYREDUCE_WORK``, ``./keyreduce-out``). It is made when
            something is first written into it.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        self.calibration = self.root / "calibration.safetensors"
        self.pruned = self.root / "pruned"
        self.dcp = self.root / "dcp"
        self.hf = self.root / "hf"
        self.benchmark = self.root / "benchmark.json"
        self.recovered = self.root / "recovered"
        self.evaluation = self.root / "eval.json"
        self.rank = self.root / "rank.json"
        self.rank_pictures = self.root / "rank"
        self.sweep = self.root / "sweep"


@contextlib.contextmanager
def appearing(target: Path, *, folder: bool, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; move it there when the block ends without an error.

    Nothing is ever seen at ``target`` but the old content or the complete new one. Whoever writes holds a lock, which
    ends with its process: what a killed run left behind is known as such, and is cleared away by the next one.

    Args:
        target: the file or folder that is to appear.
        folder: whether the temporary path is made as a folder, or left for the block to make as a file.
        overwrite: whether an existing ``target`` is replaced.

    Raises:
        KeyreduceError: ``target`` exists and ``overwrite`` is false, another run is writing it, it is a folder where a
            file is to appear or the other way round, the current folder is in it, its parent cannot be written, or the
            disk is full.
    """
    target = Path(os.path.realpath(target))
    refuse_unwritable(target, folder=folder)
    partial = target.with_name(f".{target.name}.partial")
    new_parents = [parent for parent in target.parents if not parent.exists()]
    made, aside = partial / target.name, partial / f"{target.name}.old"
    try:
        with _locked(partial, target):
            if aside.exists() and not os.path.exists(target):
                aside.rename(target)  # a run was killed while it replaced it
            refuse_existing(target, overwrite)
            _clear(partial)
            if folder:
                made.mkdir()
            yield made
            if os.path.exists(target) and not overwrite:
                raise KeyreduceError(f"{target} has appeared meanwhile, and is left as it is; give another output")
            if target.is_dir():
                # A folder cannot be renamed onto another: the old one steps aside for an instant.
                target.rename(aside)
            made.replace(target)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise KeyreduceError(f"cannot write {target}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # not empty: something has appeared in it
            for parent in new_parents:
                parent.rmdir()


def refuse_existing(target: Path | None, overwrite: bool) -> None:
    """Refuse, before the work, an output that a user named and that exists.

    Raises:
        KeyreduceError: ``target`` exists and may not be replaced.
    """
    if target is not None and os.path.exists(target) and not overwrite:
        raise KeyreduceError(f"{target} exists; pass --overwrite to replace it, or another output")


def refuse_unwritable(target: Path, *, folder: bool) -> None:
    """Refuse, before the work, an output that could not be written at its end; nothing is left behind.

    Args:
        target: the file or folder that is to appear, or to be replaced.
        folder: which of the two.

    Raises:
        KeyreduceError: ``target`` is a folder where a file is to appear or the other way round, the current folder is
            in it, or nothing can be made in the nearest parent that exists.
    """
    target = Path(os.path.realpath(target))
    # os.path, for which a folder that may not be looked into holds nothing; Path raises there.
    if os.path.exists(target) and target.is_dir() != folder:
        found, wanted = ("a folder", "a file") if target.is_dir() else ("a file", "a folder")
        raise KeyreduceError(f"{target} is {found}, where {wanted} is to be written; give another output")
    if os.path.isdir(target) and Path.cwd().is_relative_to(target):
        raise KeyreduceError(f"{target} holds the current folder and will not be replaced; give another output")
    parent = next(parent for parent in target.parents if os.path.exists(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        why = errno.EACCES if parent.is_dir() else errno.ENOTDIR
        raise KeyreduceError(f"cannot write to {parent}: {os.strerror(why)}; give another output")


def write_json(target: Path, content: dict, *, overwrite: bool = False) -> None:
    """Write ``content`` as indented JSON; it appears whole or not at all."""
    with appearing(target, folder=False, overwrite=overwrite) as temporary:
        text = json.dumps(content, indent=2)
        # A list of numbers, such as the channels that a head keeps, goes on one line.
        text = re.sub(r"\[[\s\d.,-]+\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text)
        temporary.write_text(text + "\n")


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        KeyreduceError: the file is missing, unreadable, not JSON, or not an object.
    """
    try:
        content = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise KeyreduceError(f"there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KeyreduceError(f"{path} cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise KeyreduceError(f"{path} is not valid JSON (line {error.lineno}): it may be truncated") from None
    except (ValueError, RecursionError):
        raise KeyreduceError(f"{path} holds JSON that no config or record would: it is damaged") from None
    if not isinstance(content, dict):
        raise KeyreduceError(f"{path} holds no JSON object")
    return content


def is_already_made(target: Path, recorded_inputs: dict | None, inputs: dict, overwrite: bool) -> bool:
    """Decide what an existing output means.

    Args:
        target: where a command would write.
        recorded_inputs: the inputs that the existing output says it was made from, or None if it does not say.
        inputs: the inputs of this run.
        overwrite: whether the user allowed replacement.

    Returns:
        True when ``target`` was made from these very inputs, so that there is nothing to do.
        False when it is absent or may be replaced.

    Raises:
        KeyreduceError: ``target`` exists, was made from something else, and may not be replaced.
    """
    if overwrite or not os.path.exists(target):
        return False
    if recorded_inputs == inputs:
        return True
    recorded = recorded_inputs or {}
    differing = sorted(key for key in inputs.keys() | recorded.keys() if recorded.get(key) != inputs.get(key))
    detail = f"it differs in {', '.join(differing)}" if recorded_inputs else "keyreduce did not write it"
    raise KeyreduceError(
        f"{target} exists and was made from other inputs ({detail}); "
        "pass --overwrite to replace it, or another output"
    )


def refuse_source(target: Path, source: Path) -> None:
    """Refuse an output that is, or holds, what it is made from: to replace it would delete the source.

    Raises:
        KeyreduceError: ``source`` is ``target``, or in it.
    """
    if source.resolve().is_relative_to(target.resolve()):
        raise KeyreduceError(f"{target} is, or holds, the model itself; give another output")


@contextlib.contextmanager
def _locked(partial: Path, target: Path) -> Iterator[None]:
    """Make the folder ``partial``, keep others out of it, and remove it at the end."""
    descriptor = None
    while descriptor is None:
        partial.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who had it may have removed it between our opening and our locking.
            is_still_there = os.path.samestat(os.fstat(descriptor), os.stat(partial))
        except FileNotFoundError:
            is_still_there = False
        except BlockingIOError:
            os.close(descriptor)
            raise KeyreduceError(
                f"another run is writing {target} right now; wait for it, or give another output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
            is_still_there = True  # a file system without locks
        if not is_still_there and descriptor is not None:
            os.close(descriptor)
            descriptor = None
    try:
        yield
    finally:
        _clear(partial)
        with contextlib.suppress(OSError):
            partial.rmdir()
        os.close(descriptor)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

"""Where the commands find each other's files, and how a file or folder appears whole or not at all."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from keyreduce.errors import KeyreduceError

RECORD_NAME = "keyreduce.json"
PROJECTIONS_NAME = "keyreduce.npz"


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
        self.evaluation = self.root / "eval.json"
        self.sweep = self.root / "sweep.json"


@contextlib.contextmanager
def appearing(target: Path, *, folder: bool, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; move it there when the block ends without an error.

    Nothing is ever seen at ``target`` but the old content or the complete new one. What an earlier
    run left behind when it was killed is removed.

    Args:
        target: the file or folder that is to appear.
        folder: whether the temporary path is made as a folder, or left for the block to make as a file.
        overwrite: whether an existing ``target`` is replaced.

    Raises:
        KeyreduceError: ``target`` exists and ``overwrite`` is false, it is a folder where a file is to appear or the
            other way round, the current folder is in it, or its parent cannot be written.
    """
    target = Path(os.path.realpath(target))
    refuse_existing(target, overwrite)
    refuse_unwritable(target, folder=folder)
    prefix = f".{target.name}.partial-"
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f"{prefix}*"):
            if not _is_alive(left_over.name[len(prefix) :].split("-")[0]):
                _remove(left_over)
        temporary = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise KeyreduceError(f"cannot write to {target.parent}: {error.strerror}") from error
    # mkdtemp is private to its owner; what we leave behind follows the umask as any new folder does.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o777 & ~umask)
    made = temporary if folder else temporary / target.name
    try:
        yield made
        try:
            _put(made, target)
        except OSError as error:
            raise KeyreduceError(f"cannot replace {target}: {error.strerror}") from error
    finally:
        _remove(temporary)
        with contextlib.suppress(OSError):  # not empty: something has appeared in it
            for parent in new_parents:
                parent.rmdir()


def refuse_existing(target: Path | None, overwrite: bool) -> None:
    """Refuse, before the work, an output that a user named and that exists.

    Raises:
        KeyreduceError: ``target`` exists and may not be replaced.
    """
    if target is not None and os.path.exists(target) and not overwrite:
        raise KeyreduceError(f"{target} exists; pass --overwrite to replace it, or another --output")


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
        raise KeyreduceError(f"{target} is {found}, where {wanted} is to be written; give another --output")
    if os.path.isdir(target) and Path.cwd().is_relative_to(target):
        raise KeyreduceError(f"{target} holds the current folder and will not be replaced; give another --output")
    parent = next(parent for parent in target.parents if os.path.exists(parent))
    try:
        # Made and removed at once: permissions alone do not tell of read-only disks and the like.
        Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-{os.getpid()}-", dir=parent)).rmdir()
    except OSError as error:
        raise KeyreduceError(f"cannot write to {parent}: {error.strerror}; give another --output") from None


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
    differing = sorted(key for key in inputs if (recorded_inputs or {}).get(key) != inputs[key])
    detail = f"it differs in {', '.join(differing)}" if recorded_inputs else "keyreduce did not write it"
    raise KeyreduceError(
        f"{target} exists and was made from other inputs ({detail}); "
        "pass --overwrite to replace it, or another --output"
    )


def refuse_source(target: Path, source: Path) -> None:
    """Refuse an output that is, or holds, what it is made from: to replace it would delete the source.

    Raises:
        KeyreduceError: ``source`` is ``target``, or in it.
    """
    if source.resolve().is_relative_to(target.resolve()):
        raise KeyreduceError(f"{target} is, or holds, the model itself; give another --output")


def _put(made: Path, target: Path) -> None:
    if not target.is_dir():
        made.replace(target)
        return
    # A folder cannot be renamed onto another: the old one steps aside for an instant.
    aside = made.with_name(f"{made.name}-old")
    target.rename(aside)
    made.rename(target)
    _remove(aside)


def _is_alive(process_id: str) -> bool:
    try:
        os.kill(int(process_id), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

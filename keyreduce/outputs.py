"""One protocol for everything that is written: an output is claimed, and appears whole or not at all.

Whoever makes an output holds a lock beside it for as long as the work takes, so that a second run is refused before it
has done anything. What is made on the way lies in a hidden folder beside the output, which is removed when the work
ends; what a killed run left there is removed by the next one.
"""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from keyreduce.errors import KeyreduceError

_CANNOT_WRITE = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC, errno.EPERM)
_CANNOT_WRITE += (errno.EROFS,)
_NO_LOCKS = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what file systems without locks answer
_held: dict[tuple[int, Path], "Claim"] = {}
"""What is claimed, by thread: two threads of one process keep each other out as two processes do."""


@dataclass(frozen=True)
class Claim:
    """An output, by its real path, that nobody else writes now.

    ``scratch`` is a hidden folder beside it for intermediate files. It is there for as long as the claim, in the
    process that writes.
    """

    target: Path
    folder: bool
    scratch: Path

    @contextlib.contextmanager
    def appearing(self, *, overwrite: bool = False) -> Iterator[Path]:
        """Yield a temporary path in ``scratch``; it is moved to ``target`` when the block ends without an error.

        A folder is made; a file is left for the block to make.

        Raises KeyreduceError if ``target`` exists and ``overwrite`` is false, or the disk is full.
        """
        made = self._made
        with _telling(self.target):
            refuse_existing(self.target, overwrite)
            if self.folder:
                shutil.rmtree(made, ignore_errors=True)  # of an attempt that failed within the same claim
                made.mkdir()
            yield made
            if os.path.exists(self.target) and not overwrite:
                raise KeyreduceError(f"{self.target} has appeared meanwhile, and is left as it is; give another output")
            if self.target.is_dir():
                # A folder cannot be renamed onto another: the old one steps aside for an instant.
                self.target.rename(self._aside)
            made.replace(self.target)

    @property
    def _made(self) -> Path:
        """Where the output is made: apart from the intermediate files, which may have any name."""
        return self.scratch / ".made" / self.target.name

    @property
    def _aside(self) -> Path:
        return self._made.with_name(f"{self.target.name}.old")

    def _clear(self) -> None:
        """Remove ``scratch``, after undoing a replacement that was interrupted between its two renames."""
        if self._aside.exists() and not os.path.exists(self.target):
            self._aside.rename(self.target)
        shutil.rmtree(self.scratch, ignore_errors=True)


@contextlib.contextmanager
def claimed(target: Path, *, folder: bool, by_this_process: bool = True) -> Iterator[Claim]:
    """Keep others from writing ``target`` while the block runs; within a claim of the same thread it is that claim.

    On a file system without locks nobody is kept out. ``by_this_process`` is false in all processes of torchrun but
    the first, which alone claims and writes.

    Raises KeyreduceError if another run is writing it, or see :func:`refuse_unwritable`.
    """
    target = Path(os.path.realpath(target))
    key = threading.get_ident(), target
    if key in _held:
        yield _held[key]
        return
    refuse_unwritable(target, folder=folder)
    claim = Claim(target, folder, target.with_name(f".{target.name}.partial"))
    if not by_this_process:
        yield claim
        return
    new_parents = [parent for parent in target.parents if not parent.exists()]
    try:
        with _locked(target):
            try:
                with _telling(target):
                    claim._clear()
                    claim._made.parent.mkdir(parents=True, exist_ok=True)
                _held[key] = claim
                yield claim
            finally:
                _held.pop(key, None)
                claim._clear()
    finally:
        with contextlib.suppress(OSError):  # not empty: something has appeared in it
            for parent in new_parents:
                parent.rmdir()


@contextlib.contextmanager
def appearing(target: Path, *, folder: bool, overwrite: bool = False) -> Iterator[Path]:
    """Claim ``target`` for the time of the block, and yield what :meth:`Claim.appearing` does."""
    with claimed(target, folder=folder) as claim, claim.appearing(overwrite=overwrite) as made:
        yield made


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of an output, whose parents are made; nothing of it is left."""
    lock = FileLock(target.with_name(f".{target.name}.lock"), fallback_to_soft=False)
    for attempts_left in reversed(range(100)):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            break
        except Timeout:
            raise KeyreduceError(
                f"another run is writing {target} right now; wait for it, or give another output"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                break
            # Another run that ended between the two steps has removed the folder again.
            if error.errno != errno.ENOENT or not attempts_left:
                raise KeyreduceError(f"cannot write {target}: {error.strerror}") from error
    try:
        yield
    finally:
        # While it is held: whoever has opened the file meanwhile finds that it is gone, and does not take it.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def _telling(target: Path) -> Iterator[None]:
    """Turn errors of the system into one line that says what could not be written."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise KeyreduceError(f"cannot write {target}: {error.strerror}") from error


def refuse_existing(target: Path | None, overwrite: bool) -> None:
    """Refuse, before the work, an output that a user named and that exists.

    Raises KeyreduceError if ``target`` exists and may not be replaced.
    """
    if target is not None and os.path.exists(target) and not overwrite:
        raise KeyreduceError(f"{target} exists; pass `overwrite` to replace it, or another output")


def refuse_unwritable(target: Path, *, folder: bool) -> None:
    """Refuse, before the work, an output that could not be written at its end; nothing is left behind.

    Raises KeyreduceError if ``target`` is a folder where a file is to appear or the other way round, the current folder
    is in it, or nothing can be made in the nearest parent that exists.
    """
    target = Path(os.path.realpath(target))
    # os.path, for which a folder that may not be looked into holds nothing; Path raises there.
    if os.path.exists(target) and target.is_dir() != folder:
        found, wanted = ("a folder", "a file") if target.is_dir() else ("a file", "a folder")
        raise KeyreduceError(f"{target} is {found}, where {wanted} is to be written; give another output")
    if os.path.isdir(target) and Path.cwd().is_relative_to(target):
        raise KeyreduceError(f"{target} holds the current folder and will not be replaced; give another output")
    parent = next(parent for parent in target.parents if os.path.exists(parent))
    if why := _why_unwritable(parent):
        raise KeyreduceError(f"cannot write to {parent}: {os.strerror(why)}; give another output")


def _why_unwritable(parent: Path) -> int:
    """Return the system's number of the error that keeps files from being made in a folder that exists; 0 for none."""
    if not parent.is_dir():
        return errno.ENOTDIR
    if not os.access(parent, os.W_OK | os.X_OK):
        return errno.EACCES
    try:
        before = os.stat(parent)
    except OSError:
        return 0  # another run that ended has just removed it
    try:
        # A file system that is none, such as that of processes, lets nobody make a file, whatever access says.
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        # Here too it may have been removed, and made again by a further run.
        with contextlib.suppress(OSError):
            return (error.errno or errno.EIO) if os.path.samestat(before, os.stat(parent)) else 0
    return 0


def write_json(target: Path, content: dict, *, overwrite: bool = False) -> None:
    """Write ``content`` as indented JSON, a list of numbers on one line; it appears whole or not at all."""
    with appearing(target, folder=False, overwrite=overwrite) as temporary:
        temporary.write_text(_indented(content) + "\n")


def _indented(value: object, newline: str = "\n") -> str:
    """Return indented JSON; json's own encoder in C, which does not indent, takes the numbers."""
    inner = f"{newline}  "
    if isinstance(value, dict) and value:
        # Keys may be numbers, which JSON has as strings.
        named = ((key if isinstance(key, str) else json.dumps(key), one) for key, one in value.items())
        items = (f"{json.dumps(name)}: {_indented(one, inner)}" for name, one in named)
        return f"{{{inner}{f',{inner}'.join(items)}{newline}}}"
    if isinstance(value, list | tuple) and not {*map(type, value)} <= {int, float}:
        return f"[{inner}{f',{inner}'.join(_indented(one, inner) for one in value)}{newline}]"
    return json.dumps(value)


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises KeyreduceError if the file is missing, unreadable, not JSON, or not an object."""
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


def is_already_made(target: Path, recorded_inputs: Mapping | None, inputs: Mapping, overwrite: bool) -> bool:
    """Return whether ``target`` was made from these very inputs; false where it is absent or may be replaced.

    Args:
        target: where a command would write.
        recorded_inputs: the inputs that the existing output says it was made from, or None if it does not say.
        inputs: the inputs of this run.
        overwrite: whether the user allowed replacement.

    Raises KeyreduceError if ``target`` exists, was made from something else, and may not be replaced.
    """
    if overwrite or not os.path.exists(target):
        return False
    if recorded_inputs == inputs:
        return True
    recorded = recorded_inputs or {}
    differing = sorted(key for key in inputs.keys() | recorded.keys() if recorded.get(key) != inputs.get(key))
    detail = f"it differs in {', '.join(differing)}" if recorded_inputs else "keyreduce did not write it"
    raise KeyreduceError(
        f"{target} exists and was made from other inputs ({detail}); pass `overwrite` to replace it, or another output"
    )


def dangling_link(path: Path | str) -> str:
    """Return what to say of a link that leads nowhere; nothing of any other path."""
    if os.path.islink(path) and not os.path.exists(path):
        return f"{path} is a link to {os.readlink(path)}, which is not there"
    return ""


def refuse_source(target: Path, source: Path) -> None:
    """Refuse an output that is, or holds, what it is made from: to replace it would delete the source.

    Raises KeyreduceError if ``source`` is ``target``, or in it.
    """
    if source.resolve().is_relative_to(target.resolve()):
        raise KeyreduceError(f"{target} is, or holds, the model itself; give another output")

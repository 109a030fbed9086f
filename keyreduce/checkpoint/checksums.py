"""Checksums of whole files, taken beside the writing: xxh3_128, which keeps up with memory.

A checksum tells of damage and of changes; unlike a cryptographic hash it does not withstand somebody who wants another
file to have the same one. https://github.com/Cyan4973/xxHash
"""

import queue
import threading
from collections.abc import Callable
from pathlib import Path

import xxhash

from keyreduce.errors import KeyreduceError

_PIECE_BYTES = 1 << 22


class FileHasher:
    """Hash files while they are being written, in a thread that follows the writing. A context manager.

    What it reads was just written, and so comes from memory. When the block ends without an error, it has ended too.

    Attributes:
        checksums: file name -> xxh3_128 in hex, of every file, once the block has ended.
    """

    def __init__(self) -> None:
        self.checksums: dict[str, str] = {}
        self._written: queue.SimpleQueue[tuple[Path, int] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> "FileHasher":
        self._thread.start()
        return self

    def written(self, path: Path, end: int) -> None:
        """Tell that bytes [0, end) of a file will not change any more; files are told of one after another."""
        self._written.put((path, end))

    def __exit__(self, exception_type, exception, traceback) -> None:
        self._written.put(None)
        self._thread.join()
        if self._error is not None and exception_type is None:
            error = self._error
            raise KeyreduceError(f"{error.filename or 'what was written'} cannot be read: {error.strerror}") from error

    def _follow(self) -> None:
        buffer = bytearray(_PIECE_BYTES)
        told = self._written.get()
        try:
            while told is not None:
                path, state = told[0], xxhash.xxh3_128()
                with open(path, "rb", buffering=0) as file:
                    while told is not None and told[0] == path:
                        _hash_up_to(file, told[1], state, buffer)
                        told = self._written.get()
                self.checksums[path.name] = state.hexdigest()
        except OSError as error:
            self._error = error


def checksum(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the xxh3_128 of a file, in hex.

    Args:
        path: the file.
        progress: called after each piece with the number of its bytes.

    Raises:
        KeyreduceError: it cannot be read.
    """
    state = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            _hash_up_to(file, None, state, bytearray(_PIECE_BYTES), progress)
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None
    return state.hexdigest()


def _hash_up_to(file, end: int | None, state, buffer: bytearray, progress: Callable[[int], None] | None = None) -> None:
    """Hash what comes next in an unbuffered file, up to byte ``end`` or to the end of the file."""
    view, position = memoryview(buffer), file.tell()
    while (room := len(view) if end is None else min(len(view), end - position)) > 0:
        count = file.readinto(view[:room])
        if not count:
            return
        state.update(view[:count])
        position += count
        if progress is not None:
            progress(count)

"""Checksums of whole files, taken beside the writing: xxh3_128, which keeps up with memory.

A checksum detects damage and changes. Unlike a cryptographic hash, it does not stop somebody from making another file
with the same checksum on purpose. https://github.com/Cyan4973/xxHash
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import xxhash

from keyreduce.errors import KeyreduceError

_PIECE_BYTES = 1 << 22


class FileHasher:
    """Hash files while they are being written, in a thread that follows the writing. A context manager.

    What it reads was just written, and so comes from memory. When the block ends without an error, ``checksums`` is
    file name -> xxh3_128 in hex, of every file.
    """

    def __init__(self) -> None:
        self.checksums: dict[str, str] = {}
        self._files: dict[Path, tuple[xxhash.xxh3_128, int]] = {}
        self._thread = ThreadPoolExecutor(1)
        self._pieces: list[Future[None]] = []

    def __enter__(self) -> "FileHasher":
        return self

    def written(self, path: Path, end: int) -> None:
        """Report that bytes [0, end) of a file will not change any more."""
        self._pieces.append(self._thread.submit(self._follow, path, end))

    def __exit__(self, exception_type, *_) -> None:
        self._thread.shutdown(cancel_futures=exception_type is not None)
        if exception_type is None:
            for piece in self._pieces:
                piece.result()
            self.checksums = {path.name: state.hexdigest() for path, (state, _) in self._files.items()}

    def _follow(self, path: Path, end: int) -> None:
        state, begin = self._files.get(path) or (xxhash.xxh3_128(), 0)
        feed(path, state.update, begin=begin, end=end)
        self._files[path] = state, end


def checksum(path: Path) -> str:
    """Return the xxh3_128 of a file, in hex. Raises KeyreduceError if it cannot be read."""
    state = xxhash.xxh3_128()
    feed(path, state.update)
    return state.hexdigest()


def feed(path: Path, *uses: Callable[[memoryview], object], begin: int = 0, end: int = sys.maxsize) -> None:
    """Call each function with bytes [begin, end) of a file, piece by piece; a piece is overwritten by the next one.

    Raises KeyreduceError if the file cannot be read.
    """
    view = memoryview(bytearray(_PIECE_BYTES))
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            while begin < end and (count := file.readinto(view[: end - begin])):
                for use in uses:
                    use(view[:count])
                begin += count
    except OSError as error:
        raise KeyreduceError(f"{path} cannot be read: {error.strerror}") from None

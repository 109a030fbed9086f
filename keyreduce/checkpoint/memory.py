"""Memory of freed tensors, given back to the system."""

import contextlib
import ctypes
from collections.abc import Iterator

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of malloc.h
_LARGE, _KEPT = 32 << 20, 256 << 20  # bytes


@contextlib.contextmanager
def freed_tensors_returned() -> Iterator[None]:
    """While the block runs, let the C library give the memory of each large freed tensor back to the system at once.

    glibc raises its threshold with every large block that is freed, and from then on keeps such blocks, in pieces that
    the next tensor may not fit: a stream of tensors would come to hold several. Blocks of up to 32 MiB are kept, 256
    MiB in all: to get each of them anew takes longer than to write what is in it. Another C library is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
    yield

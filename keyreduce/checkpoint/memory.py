"""Memory of tensors that are done with."""

import contextlib
import ctypes
from collections.abc import Iterator

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of malloc.h
_LOW, _HIGH = 1 << 20, 32 << 20


@contextlib.contextmanager
def freed_tensors_returned() -> Iterator[None]:
    """While the block runs, let the C library give the memory of each freed tensor back to the system at once.

    glibc raises its threshold with every large block that is freed, and from then on keeps such blocks, in pieces that
    the next tensor may not fit: a stream of tensors would come to hold several. A model that runs is better off with
    memory that is kept, so the thresholds are high afterwards. Another C library is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        mallopt(option, _LOW)
    try:
        yield
    finally:
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(option, _HIGH)

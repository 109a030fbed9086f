"""Memory of tensors that are done with."""

import ctypes

_M_MMAP_THRESHOLD = -3  # of malloc.h
_THRESHOLD = 1 << 20


def return_freed_tensors() -> None:
    """Let the C library give the memory of each freed tensor back to the system at once; one that cannot is left alone.

    glibc raises its threshold with every large block that is freed, and from then on keeps such blocks, in pieces that
    the next tensor may not fit: a stream of tensors would come to hold several.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)

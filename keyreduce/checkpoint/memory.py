"""Memory of tensors that are done with."""

import ctypes

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # of malloc.h
_THRESHOLD = 1 << 20


def return_freed_tensors() -> None:
    """Let the C library give the memory of each freed tensor back to the system at once; one that cannot is left alone.

    glibc raises its threshold with every large block that is freed, and from then on keeps such blocks, in pieces that
    the next tensor may not fit: a stream of tensors would come to hold several.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        library.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)

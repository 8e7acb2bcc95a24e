"""Set how malloc returns memory to the system."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in malloc.h
LARGE_BLOCK = 4 * 2**20


def return_large_blocks() -> None:
    """Make malloc return each large block to the system as soon as it is freed.

    glibc maps blocks above a threshold separately. By default, it raises the threshold, up to 32 MiB, when it
    frees a larger block. After that, request bodies are in the heap and leave holes there, so the process
    takes up to twice the memory that it uses. If the threshold is set, glibc does not raise it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has this function
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        # After the call above, the trim threshold stays low. Then malloc would also return the memory of
        # smaller bodies, and soon need it again.
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BLOCK)

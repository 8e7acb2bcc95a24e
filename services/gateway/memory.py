"""Set how malloc returns memory to the system."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as in malloc.h
LARGE_BLOCK = 4 * 2**20


def return_large_blocks() -> None:
    """Make malloc return each large block to the system as soon as it is freed.

    glibc gives each block above a threshold its own memory mapping, and removes the mapping when the block is
    freed. By default, the threshold rises to the size of each larger block that is freed, up to 32 MiB. Later
    request bodies below the new threshold are in the heap, and leave holes there when they are freed. So the
    process takes up to twice the memory that it uses. A threshold that is set by a program never rises.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has this function
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        # After the call above, glibc also leaves the trim threshold at its low default. Then malloc would
        # return the memory of smaller bodies, too, and soon need it again. So set a higher trim threshold.
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BLOCK)

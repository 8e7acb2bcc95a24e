"""Set how malloc returns memory to the system."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BLOCK = 4 * 2**20


def return_large_blocks() -> None:
    """Make malloc return each large block to the system as soon as it is freed.

    By default, glibc raises its threshold for separate mappings, up to 32 MiB, whenever it frees a larger
    block. Then bodies leave holes in the heap, and the process holds up to twice the memory that it uses. A
    threshold that is set once stays as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        # The call above also fixes the trim threshold, but too low: malloc would return smaller bodies, too.
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BLOCK)

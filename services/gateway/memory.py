"""How this process gives memory back to the system."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGE_BLOCK = 4 * 2**20


def return_large_blocks() -> None:
    """Let the memory of each large body go back to the system as soon as it is freed.

    glibc raises the size from which a block is a mapping of its own, up to 32 MiB, each time that it frees a
    larger one; from then on bodies leave holes in the heap, and what the process holds is up to twice what it
    uses. A fixed size stays as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it, and needs it
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        # From then on fixed too, and too low: smaller bodies would be given back and had anew each time.
        mallopt(M_TRIM_THRESHOLD, 2 * LARGE_BLOCK)

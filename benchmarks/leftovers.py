"""What a killed server leaves in shared memory: semaphores of Python's, regions of Triton's."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tidegate.stack.processes import PROC

SHARED_MEMORY = Path("/dev/shm")
KINDS = ("sem.mp-", "tidegate-bench-")


def names() -> set[str]:
    """What lies there now, of the kinds that the benchmarks' servers make."""
    if not SHARED_MEMORY.is_dir():
        return set()
    return {path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(KINDS)}


def clear(before: set[str]) -> None:
    """Remove what came since ``before`` and is no longer used by any process."""
    left = {name for name in names() - before if _ours(SHARED_MEMORY / name)}
    for name in left - _in_use(left):
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def _ours(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_uid == os.getuid()
    return False


def _in_use(candidates: set[str]) -> set[str]:
    """Those that a process has mapped; a process whose maps cannot be read is another user's."""
    used = set()
    for maps in PROC.glob("[0-9]*/maps") if candidates else ():
        with contextlib.suppress(OSError):
            text = maps.read_text(errors="replace")
            used |= {name for name in candidates if f"{SHARED_MEMORY}/{name}" in text}
    return used

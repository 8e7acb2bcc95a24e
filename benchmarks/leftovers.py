"""Find and remove what a killed server leaves in shared memory: Python's semaphores, Triton's regions."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tidegate.stack.processes import PROC

SHARED_MEMORY = Path("/dev/shm")
KINDS = ("sem.mp-", "tidegate-bench-")


def names() -> set[str]:
    """Return the existing files of the kinds that the benchmarks' servers create."""
    if not SHARED_MEMORY.is_dir():
        return set()
    return {path.name for path in SHARED_MEMORY.iterdir() if path.name.startswith(KINDS)}


def clear(before: set[str]) -> None:
    """Remove files that are not in ``before`` and that no process uses."""
    left = {name for name in names() - before if _ours(SHARED_MEMORY / name)}
    for name in left - _in_use(left):
        (SHARED_MEMORY / name).unlink(missing_ok=True)


def _ours(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_uid == os.getuid()
    return False


def _in_use(candidates: set[str]) -> set[str]:
    """Return the files that a process has mapped. Unreadable processes belong to another user."""
    used = set()
    for maps in PROC.glob("[0-9]*/maps") if candidates else ():
        with contextlib.suppress(OSError):
            text = maps.read_text(errors="replace")
            used |= {name for name in candidates if f"{SHARED_MEMORY}/{name}" in text}
    return used

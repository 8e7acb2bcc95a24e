"""Names a router's process, so that another one on the same machine can tell that it has died."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def own(incarnation: str) -> str:
    """Return ``<host>:<pid>:<incarnation>@<place>``; the place is where that pid means this process."""
    return f"{socket.gethostname()}:{os.getpid()}:{incarnation}@{_place()}"


def is_dead(name: str) -> bool:
    """Return True if the process of that name ran where this one runs, and is no more."""
    told, _, place = name.partition("@")
    pid = told.split(":")[-2:][0]
    if not place or place != _place() or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():
        return True  # a container that was started again gives its process the same pid
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _place() -> str:
    """This boot of the machine and the namespace of its pids; empty if the system does not tell."""
    with contextlib.suppress(OSError):
        return f"{BOOT.read_text().strip()[:8]}-{Path('/proc/self/ns/pid').stat().st_ino}"
    return ""

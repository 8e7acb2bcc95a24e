"""Names of router processes. A router on the same machine can tell from a name if that process has ended."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

BOOT = Path("/proc/sys/kernel/random/boot_id")


def own(incarnation: str) -> str:
    """Return the name of this process: ``<host>:<pid>:<incarnation>@<namespace>``.

    ``incarnation``: a random text that is new at each start. ``<namespace>``: the pid namespace of ``<pid>``.
    """
    return f"{socket.gethostname()}:{os.getpid()}:{incarnation}@{_namespace()}"


def is_dead(name: str) -> bool:
    """Return True if the named process ran in this process's pid namespace and has ended.

    ``name``: the name of another process, never this process's own name.
    """
    process, _, namespace = name.partition("@")
    pid = process.split(":")[-2:][0]
    if not namespace or namespace != _namespace() or not pid.isdecimal():
        return False
    if int(pid) == os.getpid():
        return True  # the named process has ended, and this one got its pid, as in a restarted container
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


def _namespace() -> str:
    """Return a text that identifies the machine's boot and the pid namespace; empty if unknown."""
    with contextlib.suppress(OSError):
        return f"{BOOT.read_text().strip()[:8]}-{Path('/proc/self/ns/pid').stat().st_ino}"
    return ""

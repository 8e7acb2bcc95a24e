"""Read the processes of this machine from /proc."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path

from services.worker.domain.deaths import of_wait_status


def exit_status(pid: int) -> int | None:
    """Return the exit status of an ended process; None if it runs or its parent has read the status."""
    fields = _stat(pid)
    if not fields or fields[0] != "Z":
        return None
    return of_wait_status(int(fields[-1]))


def start_ticks(pids: Iterable[int]) -> dict[int, str]:
    """Return the kernel's clock tick at which each process started. Ended processes are left out.

    A pid alone does not identify a process, because a later process can get the same pid. The pid and the
    start tick together identify it.
    """
    return {pid: fields[19] for pid in pids if (fields := _stat(pid))}


def kill_all(processes: Mapping[int, str]) -> None:
    """Kill the processes with these pids and start ticks, unless they have ended."""
    for pid, tick in processes.items():
        if start_ticks([pid]).get(pid) == tick:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return all descendants of the process ``pid``."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def naming(text: str) -> list[int]:
    """Return the pids of the processes whose command lines contain ``text``, except this process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if text.encode() in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
    return found


def state(pid: int) -> str:
    """Return the kernel's letter for a process's state; empty if the process is gone."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def parent(pid: int) -> int:
    """Return the pid of the parent; 0 if the process is gone."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the process's name; empty if the process is gone.

    The fields are separated at spaces. The name is left out, because it may contain spaces and brackets.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def name(pid: int) -> bytes:
    """Return the first 15 bytes of a process's name; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().strip()
    except OSError:
        return b""


def memory_mb(pids: Iterable[int]) -> int:
    """Return about how many MiB of memory these processes use.

    The memory that each process has for itself is added up. Shared memory is counted once, as the largest
    amount that one of the processes shares.
    """
    own, shared = 0, 0
    for pid in pids:
        with contextlib.suppress(OSError, IndexError, ValueError):
            sizes = [int(each) for each in Path(f"/proc/{pid}/statm").read_text().split()]
            own += sizes[1] - sizes[2]
            shared = max(shared, sizes[2])
    return (own + shared) * os.sysconf("SC_PAGE_SIZE") // 2**20

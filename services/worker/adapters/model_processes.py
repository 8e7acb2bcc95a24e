"""The processes that Triton runs a Python model in, watched from outside: Triton itself never says that one
has ended, and starts no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from services.worker.domain.deaths import of_wait_status

# The kernel keeps 15 bytes of a process's name.
STUB = b"triton_python_backend_stub"[:15]


class ModelProcesses:
    """Watch the Python processes below one tritonserver; ``on_end`` gets the exit status of one that ended.

    The status is an exit code, or the signal's number as a negative one; None where it cannot be read. Only
    the kernel's event wakes this up; where a process cannot be waited for, :meth:`look` finds its end.
    """

    def __init__(self, server: int, descendants: Iterable[int], on_end: Callable[[int | None], None]) -> None:
        self._server = server
        self._on_end = on_end
        self._open: dict[int, int] = {}
        self._stopped: set[int] = set()
        # What a model forks has the same name, and may end when it likes: only Triton's own children count.
        self.pids = [pid for pid in descendants if _name(pid) == STUB and _parent(pid) == server]
        loop = asyncio.get_running_loop()
        for pid in self.pids:
            with contextlib.suppress(OSError, AttributeError):
                self._open[pid] = os.pidfd_open(pid)
                loop.add_reader(self._open[pid], self._ended, pid)

    def close(self) -> None:
        """Watch no more."""
        for handle in self._open.values():
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)
        self._open, self.pids = {}, []

    def look(self) -> bool:
        """Report processes that have ended; return whether one was stopped at this look and the last one.

        Only a stop by a signal counts, not that of a debugger.
        """
        for pid in list(self.pids):
            if _state(pid) in {"Z", "X", ""}:
                self._ended(pid)
        stopped = {pid for pid in (self._server, *self.pids) if _state(pid) == "T"}
        still, self._stopped = stopped & self._stopped, stopped
        return bool(still)

    def _ended(self, pid: int) -> None:
        if pid not in self.pids:
            return
        self.pids.remove(pid)
        if (handle := self._open.pop(pid, -1)) >= 0:
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)
        self._on_end(exit_status(pid))


def exit_status(pid: int) -> int | None:
    """Return the exit status of a process that has ended and that its parent has not waited for yet."""
    fields = _stat(pid)
    if not fields or fields[0] != "Z":
        return None
    return of_wait_status(int(fields[-1]))


def births(pids: Iterable[int]) -> dict[int, str]:
    """Return the processes by pid, with the kernel's start tick: together they name one for good."""
    return {pid: fields[19] for pid in pids if (fields := _stat(pid))}


def end(processes: Mapping[int, str]) -> None:
    """Kill these processes, unless they have ended and others have their pids."""
    for pid, born in processes.items():
        if births([pid]).get(pid) == born:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    fields = _stat(pid)
    return fields[0] if fields else ""


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def _stat(pid: int) -> list[str]:
    """Return the fields of a process behind its name, which may contain anything; none if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _name(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/comm").read_bytes().strip()
    except OSError:
        return b""

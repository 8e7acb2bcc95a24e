"""Watch the processes in which Triton runs a Python model.

If a process of a Python model ends, Triton does not report this and starts no other process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable

from services.worker.adapters import process_table

# The kernel keeps only the first 15 bytes of a process's name.
STUB = b"triton_python_backend_stub"[:15]


def model_processes(server: int, descendants: Iterable[int]) -> list[int]:
    """Return the pids of the processes in which a tritonserver runs Python models.

    Processes that have just ended are included. ``descendants``: all descendants of the tritonserver. Only
    its direct children are returned. A process that a model forks has the same name, but its end is no
    failure.
    """
    return [
        pid for pid in descendants if process_table.name(pid) == STUB and process_table.parent(pid) == server
    ]


class ModelProcesses:
    """Watch the Python processes of one tritonserver.

    ``on_end`` is called when a process ends. It gets the exit code, or a signal's number as a negative
    number, or None if the status cannot be read. On a kernel without pidfds, only :meth:`look` notices the
    end of a process.
    """

    def __init__(self, server: int, descendants: Iterable[int], on_end: Callable[[int | None], None]) -> None:
        self._server = server
        self._on_end = on_end
        self._open: dict[int, int] = {}
        self._stopped: set[int] = set()
        self.pids = model_processes(server, descendants)
        loop = asyncio.get_running_loop()
        for pid in self.pids:
            with contextlib.suppress(OSError, AttributeError):
                self._open[pid] = os.pidfd_open(pid)
                loop.add_reader(self._open[pid], self._ended, pid)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._open.values():
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)
        self._open, self.pids = {}, []

    def look(self) -> bool:
        """Call ``on_end`` for each process that has ended, and look for stopped processes.

        Return True if this call and the call before it both found the same process stopped. A stopped process
        still exists, but a signal such as SIGSTOP has paused it. A process in a debugger does not count as
        stopped. Triton's own process can be the stopped one, too.
        """
        for pid in list(self.pids):
            if process_table.state(pid) in {"Z", "X", ""}:
                self._ended(pid)
        stopped = {pid for pid in (self._server, *self.pids) if process_table.state(pid) == "T"}
        still, self._stopped = stopped & self._stopped, stopped
        return bool(still)

    def _ended(self, pid: int) -> None:
        if pid not in self.pids:
            return
        self.pids.remove(pid)
        if (handle := self._open.pop(pid, -1)) >= 0:
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)
        self._on_end(process_table.exit_status(pid))

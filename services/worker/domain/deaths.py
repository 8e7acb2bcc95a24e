"""Describe how a model's process ended."""

from __future__ import annotations

import signal
from dataclasses import dataclass

MODEL, SERVER = "the model's process", "the model server"


@dataclass(frozen=True, slots=True)
class Death:
    """The end of one process. ``role`` names the process; ``at`` is in seconds since the epoch.

    ``status``: the exit code of the process. If a signal ended the process, it is the signal's number with a
    minus sign. It is None if it is unknown. ``out_of_memory``: True if the kernel killed a process of this
    Triton because memory was short. ``ended_for``: the worker's reason, if the worker ended the process.
    """

    role: str
    at: float
    status: int | None = None
    out_of_memory: bool = False
    ended_for: str = ""

    @property
    def description(self) -> str:
        """Return the death as a text such as "the model's process ended (signal 9, out of memory?)"."""
        if self.ended_for:
            return f"{self.role} was ended: {self.ended_for}"
        return f"{self.role} ended ({self._describe_status()})"

    def _describe_status(self) -> str:
        if self.out_of_memory:
            return f"{describe_status(self.status)}, out of memory"
        # Tidegate did not send this SIGKILL. So the kernel probably sent it, because memory was short.
        guess = ", out of memory?" if self.status == -signal.SIGKILL else ""
        return f"{describe_status(self.status)}{guess}"


def describe_status(status: int | None) -> str:
    """Return an exit status as text; a negative one is a signal's number."""
    if status is None:
        return "unknown exit status"
    return f"signal {-status}" if status < 0 else f"exit code {status}"


def of_wait_status(raw: int) -> int:
    """Convert a status of wait(2) to an exit code, or to a negative signal number."""
    number = raw & 0x7F
    return -number if number else raw >> 8 & 0xFF

"""CPU time of the processes of a stack, by kind of process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tidegate.stack import processes
from tidegate.stack.processes import PROC, Process

TICK_US = 1_000_000 / os.sysconf("SC_CLK_TCK")

# Searched in the command line, in this order: the command line of a Triton has the folder of its worker.
KINDS = (
    ("tritonserver", "Triton"),
    ("triton_python_backend_stub", "Triton"),
    ("beam.smp", "RabbitMQ"),
    ("valkey-server", "Valkey"),
    ("services.gateway", "gateway"),
    ("services.worker", "worker"),
)
OTHERS = "others"


@dataclass(frozen=True, slots=True)
class Usage:
    """User and system CPU time until now in microseconds, by kind of process."""

    us: Mapping[str, float]

    def since(self, before: Usage) -> dict[str, float]:
        """Return the CPU time used between two readings."""
        return {kind: total - before.us.get(kind, 0.0) for kind, total in self.us.items()}


def usage(members: Iterable[Process]) -> Usage:
    """Read the CPU time of these processes now."""
    found: dict[str, float] = {}
    for process in members:
        kind = kind_of(process.command(limit=None))
        found[kind] = found.get(kind, 0.0) + _us(process.pid)
    return Usage(found)


def kind_of(command: str) -> str:
    """Return the part of the stack that a command line belongs to."""
    return next((kind for word, kind in KINDS if word in command), OTHERS)


def family(root: int) -> list[Process]:
    """Return a process and its descendants."""
    found = [process] if (process := processes.find(root)) else []
    for task in (PROC / str(root) / "task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += family(int(child))
    return found


def _us(pid: int) -> float:
    """Return a process's user and system time in microseconds; 0 if it has ended."""
    try:
        fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) * TICK_US

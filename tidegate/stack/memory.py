"""Read from /proc how much resident memory each part of a stack uses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tidegate.stack import processes
from tidegate.stack.child import REPLICA
from tidegate.stack.processes import PROC, Process
from tidegate.stack.record import StackRecord

_FIELD = re.compile(r"^(Pss|Rss):\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class PartMemory:
    """The memory of a part of the stack, in bytes.

    Several processes can share a page of memory. ``pss`` divides the size of such a page among the processes,
    so the sum over all parts is exact. ``rss`` counts the full size of the page for each process.
    """

    name: str
    processes: int
    pss: int
    rss: int


def of_stack(record: StackRecord, state: Path) -> list[PartMemory]:
    """Return the memory of each part and each replica. Skip processes that cannot be read."""
    parents = {child.process.pid: child.name for child in record.children if child.process}
    if record.supervisor is not None:
        parents[record.supervisor.pid] = "supervisor"
    found: dict[str, list[tuple[int, int]]] = {}
    for process in processes.marked(state):
        sizes = _read(process)
        if sizes is not None:
            found.setdefault(_name(process, parents), []).append(sizes)
    return [
        PartMemory(name, len(each), sum(pss for pss, _ in each), sum(rss for _, rss in each))
        for name, each in sorted(found.items(), key=lambda pair: -sum(pss for pss, _ in pair[1]))
    ]


def total(parts: Iterable[PartMemory]) -> int:
    """Return the memory of all parts together in bytes (PSS)."""
    return sum(part.pss for part in parts)


def _name(process: Process, parents: Mapping[int, str]) -> str:
    if process.pid in parents:
        return parents[process.pid]
    if replica := process.environment().get(REPLICA):
        return f"replica {replica}"
    at = process.pid
    while (at := _parent(at)) > 1:
        if at in parents:
            return parents[at]
    return "other"


def _parent(pid: int) -> int:
    try:
        return int((PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _read(process: Process) -> tuple[int, int] | None:
    try:
        text = (PROC / str(process.pid) / "smaps_rollup").read_text()
    except OSError:
        return None
    sizes = {name: int(value) * 1024 for name, value in _FIELD.findall(text)}
    return (sizes["Pss"], sizes["Rss"]) if len(sizes) == 2 else None

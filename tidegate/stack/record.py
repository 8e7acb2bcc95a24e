"""``run/stack.json``: the supervisor's record of its children, for other processes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tidegate.stack.processes import Process

ChildPhase = Literal["waiting", "starting", "ready", "done", "restarting", "stopping", "stopped", "failed"]
StackPhase = Literal["starting", "running", "stopping", "stopped", "failed", "unattended"]
"""``unattended``: children run without a supervisor, because it died."""


@dataclass(frozen=True, slots=True)
class ChildRecord:
    """The state of one child. ``detail``: the reason for the state in a few words.

    ``since``: when the state began, in seconds since the epoch. ``optional``: True if the start of the stack
    does not wait for the child.
    """

    name: str
    state: ChildPhase = "waiting"
    process: Process | None = None
    ports: tuple[int, ...] = ()
    restarts: int = 0
    since: float = 0.0
    detail: str = ""
    log: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class StackRecord:
    """The state of the whole stack. ``error`` is set if ``phase`` is ``failed``."""

    phase: StackPhase = "stopped"
    supervisor: Process | None = None
    children: tuple[ChildRecord, ...] = ()
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON types, for files and for ``--json``."""
        return asdict(self)


@dataclass(slots=True)
class RunFolder:
    """The ``run`` folder of a stack: its record and its locks."""

    path: Path
    _held: list[int] = field(default_factory=list)

    def read(self) -> StackRecord:
        """Return the last record; an empty record if it is missing or unreadable."""
        try:
            return _parse(json.loads((self.path / "stack.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return StackRecord()

    def write(self, record: StackRecord) -> None:
        """Replace the record atomically, so that a reader sees either the old or the new record."""
        fresh = self.path / "stack.json.new"
        fresh.write_text(json.dumps(record.as_dict(), indent=1))
        fresh.replace(self.path / "stack.json")

    def hold(self, name: str) -> bool:
        """Take the lock ``name`` and keep it until this process ends.

        Return False if another process has the lock.
        """
        lock = os.open(self.path / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        self._held.append(lock)
        return True

    @contextmanager
    def turn(self, name: str = "turn") -> Iterator[None]:
        """Wait for the lock ``name``, and hold it during the block.

        With the lock ``turn``, only one ``up`` or ``down`` runs at a time. A restart has another lock. So
        ``down`` does not wait for a restart, and can end it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def with_child(record: StackRecord, name: str, **changes: Any) -> StackRecord:
    """Return a copy of the record in which some fields of one child are replaced.

    ``changes``: the new values of these fields.
    """
    children = tuple(replace(c, **changes) if c.name == name else c for c in record.children)
    return replace(record, children=children)


def _parse(raw: dict[str, Any]) -> StackRecord:
    children = tuple(
        ChildRecord(**{**c, "process": _process(c["process"]), "ports": tuple(c["ports"])})
        for c in raw["children"]
    )
    return StackRecord(raw["phase"], _process(raw["supervisor"]), children, raw["error"])


def _process(raw: dict[str, int] | None) -> Process | None:
    return Process(raw["pid"], raw["started"]) if raw else None

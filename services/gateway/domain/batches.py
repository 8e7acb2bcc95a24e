"""Batches of jobs: a file of requests, one a line, and a file of results with a line for each. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tidegate.kernel.protocol.jobs import Level, iso

State = Literal["running", "cancelling", "completed", "cancelled", "failed"]
OVER: frozenset[State] = frozenset({"completed", "cancelled", "failed"})

# What may become of a line.
OUTCOMES = ("succeeded", "failed", "cancelled", "expired")


class FileChunk(NamedTuple):
    """A piece of a file in the blob store: whole lines."""

    key: str
    lines: int
    size: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What is known of a batch. Times are milliseconds since the epoch, 0: it has not happened.

    ``model``, ``version``, ``level`` and ``ttl_s`` are those of lines that name none. ``written`` lines have
    their result on disk, by outcome in ``counts``; ``done`` has those that are over and not on disk yet too.
    """

    id: bytes
    state: State
    principal: str
    lines: int
    created_ms: int
    model: str = ""
    version: str = ""
    level: Level = "low"
    ttl_s: float | None = None
    endpoints: tuple[str, ...] | None = None
    finished_ms: int = 0
    written: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    done: int = 0
    error: str = ""
    size: int = 0

    @property
    def over(self) -> bool:
        """Whether nothing happens to it any more."""
        return self.state in OVER

    def public(self) -> dict[str, Any]:
        """The batch as a client sees it."""
        path = f"/v1/batches/{self.id.hex()}"
        return {
            "id": self.id.hex(),
            "status": self.state,
            "model": self.model or None,
            "version": self.version or None,
            "principal": self.principal,
            "priority": self.level,
            "created_at": iso(self.created_ms),
            "finished_at": iso(self.finished_ms),
            "lines": self.lines,
            "done": max(self.done, self.written),
            "counts": {outcome: self.counts.get(outcome, 0) for outcome in OUTCOMES},
            "error": self.error or None,
            "result_bytes": self.size,
            "urls": {
                "status": path,
                "results": f"{path}/results",
                "cancel": path,
                "jobs": f"/v1/jobs?batch={self.id.hex()}",
            },
        }

"""Batches of jobs, with a file of requests and a file of results: one request or result per line. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from services.gateway.domain.openai.facts import OpenAiFacts
from tidegate.kernel.protocol.jobs import Level, iso

BatchState = Literal["running", "cancelling", "completed", "cancelled", "failed", "expired"]
OVER: frozenset[BatchState] = frozenset({"completed", "cancelled", "failed", "expired"})

# The final statuses of a line.
OUTCOMES = ("succeeded", "failed", "cancelled", "expired")


class FileChunk(NamedTuple):
    """A piece of a file in the blob store. It has ``lines`` whole lines and ``size`` bytes."""

    key: str
    lines: int
    size: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The record of a batch.

    Times are milliseconds since the epoch; 0 means that the event has not happened yet.

    ``model``, ``version``, ``level`` and ``ttl_s``: the defaults for the batch's lines. ``written``: the
    number of lines whose results are on disk. ``counts``: the number of these lines by outcome. ``done``: the
    number of finished lines, on disk or not.

    ``openai``: set only for a batch of OpenAI's API. The file of such a batch was checked at
    ``validated_ms``. Such a batch has two result files, and ``counts`` also has the lines and bytes of these
    files. ``weight``, ``role``: see :class:`~tidegate.kernel.protocol.access.Principal`.
    """

    id: bytes
    state: BatchState
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
    openai: OpenAiFacts | None = None
    validated_ms: int = 0
    cancelling_ms: int = 0
    weight: int = 1
    role: str = ""

    @property
    def over(self) -> bool:
        """Return True if the state is final."""
        return self.state in OVER

    def public(self) -> dict[str, Any]:
        """Return the batch as the API shows it."""
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

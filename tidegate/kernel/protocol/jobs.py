"""The records of durable jobs, and the transitions between a job's states. Pure.

    accepting -> queued -> running -> succeeded | failed | cancelled | expired

``accepting`` means that the broker has not confirmed the job's message yet. Callers see this state as
``queued``. If a worker is lost, its job stays ``running`` and gets the next attempt. The four last states are
terminal: a job never leaves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any, Literal, NamedTuple, get_args

State = Literal["accepting", "queued", "running", "succeeded", "failed", "cancelled", "expired"]
Terminal = Literal["succeeded", "failed", "cancelled", "expired"]
Level = Literal["high", "normal", "low"]
Outcome = Literal["run", "drop", "failed", "expired", "suspect"]

STATES: tuple[State, ...] = get_args(State)
TERMINAL: frozenset[State] = frozenset(get_args(Terminal))
LEVELS: tuple[Level, ...] = get_args(Level)

# While jobs of all priority levels wait, a worker takes this many jobs of each level in one round. So no
# level waits forever.
WEIGHTS: Mapping[Level, int] = {"high": 16, "normal": 4, "low": 1}
MAX_ATTEMPTS = 3

ID_SIZE = 16
_ENTROPY_SIZE = 10


def new_id(now_ms: int, entropy: bytes) -> bytes:
    """Return a job's id: 48 bits of milliseconds since the epoch and 80 random bits.

    ``entropy``: the random bits, as 10 bytes. When ids are sorted, they are in the order of creation. The
    job's request frame has the same id.
    """
    if len(entropy) != _ENTROPY_SIZE:
        raise ValueError(f"{_ENTROPY_SIZE} random bytes are required, got {len(entropy)}")
    return now_ms.to_bytes(6, "big") + entropy


def read_id(text: str) -> bytes | None:
    """Parse an id of 32 lower-case hex digits. Return None for any other text."""
    if len(text) != 2 * ID_SIZE or not all(c in "0123456789abcdef" for c in text):
        return None
    return bytes.fromhex(text)


@dataclass(frozen=True, slots=True)
class Idempotency:
    """An idempotency key, with the sha256 of the request's body."""

    key: str
    body: bytes


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to accept. Times are milliseconds since the epoch.

    ``frame``: the job's request frame, with the same id, attempt 0 and the job's deadline. ``ask``: how to
    encode the result for the caller. ``retry_safe``: True if the frame has the flag RETRY_SAFE.
    """

    id: bytes
    frame: bytes
    model: str
    endpoint: str
    deployment: str
    version: int
    principal: str
    created_ms: int
    expires_ms: int
    level: Level = "normal"
    retry_safe: bool = True
    ask: dict[str, Any] = field(default_factory=dict)
    webhook: str | None = None
    batch: str | None = None
    line: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    idempotency: Idempotency | None = None


class Accepted(NamedTuple):
    """The id of an accepted job.

    ``fresh``: False if the job already existed, because an earlier request had the same idempotency key.
    """

    id: bytes
    fresh: bool


@dataclass(frozen=True, slots=True)
class Job:
    """The record of a job. Times are milliseconds since the epoch; 0 means not yet.

    ``attempt``: 0 before the job first runs, then counted from 1.
    ``wait_us``, ``compute_us``: microseconds of waiting in the worker, and of the model call.
    ``result_size``: the size of the reply frame in bytes.
    """

    id: bytes
    state: State
    attempt: int
    model: str
    endpoint: str
    deployment: str
    version: int
    principal: str
    level: Level
    created_ms: int
    expires_ms: int
    queued_ms: int = 0
    started_ms: int = 0
    finished_ms: int = 0
    lease_ms: int = 0
    worker: str = ""
    error: dict[str, str] | None = None
    wait_us: int = 0
    compute_us: int = 0
    ask: dict[str, Any] = field(default_factory=dict)
    webhook: str | None = None
    batch: str | None = None
    line: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    result_size: int = 0
    retry_safe: bool = True

    @property
    def terminal(self) -> bool:
        """True if the job's state is terminal."""
        return self.state in TERMINAL

    @property
    def status(self) -> str:
        """The job's state as clients see it."""
        return "queued" if self.state == "accepting" else self.state

    def public(self) -> dict[str, Any]:
        """Return the job as clients see it: times in ISO 8601 (UTC), durations in milliseconds."""
        return {
            "id": self.id.hex(),
            "status": self.status,
            "model": self.model,
            "endpoint": self.endpoint,
            "deployment": self.deployment,
            "version": self.version,
            "principal": self.principal,
            "priority": self.level,
            "attempts": self.attempt,
            "created_at": iso(self.created_ms),
            "queued_at": iso(self.queued_ms),
            "started_at": iso(self.started_ms),
            "finished_at": iso(self.finished_ms),
            "expires_at": iso(self.expires_ms),
            "worker": self.worker or None,
            "error": self.error,
            "timing": self._timing(),
            "webhook": self.webhook,
            "batch": self.batch,
            "line": self.line,
            "metadata": self.metadata,
            "result_bytes": self.result_size,
        }

    def _timing(self) -> dict[str, float]:
        found = {}
        if self.started_ms:
            found["queue_ms"] = float(max(self.started_ms - self.created_ms, 0))
        if self.compute_us:
            found |= {"worker_wait_ms": self.wait_us / 1e3, "compute_ms": self.compute_us / 1e3}
        if self.finished_ms:
            found["total_ms"] = float(max(self.finished_ms - self.created_ms, 0))
        return found


class JobEvent(NamedTuple):
    """A line of a job's log. ``seq`` counts from 1, ``at_ms`` is milliseconds since the epoch.

    ``detail``: the worker if the state is ``running``; the reason if the job failed.
    """

    seq: int
    at_ms: int
    state: State
    attempt: int
    detail: str = ""

    def public(self) -> dict[str, Any]:
        """Return the event as clients see it."""
        shown = {"status": "queued" if self.state == "accepting" else self.state, "at": iso(self.at_ms)}
        extra = {"worker" if self.state == "running" else "reason": self.detail} if self.detail else {}
        return {**shown, "attempt": self.attempt, **extra}


class Take(NamedTuple):
    """A worker's request for permission to run a job now. The job store answers with a :class:`Taken`.

    ``frame_attempt``: the number of the attempt in the delivered frame. ``token``: a random value of the
    delivery. A repeated request with the same token gets the same attempt. ``lost``: if the model server died
    during this delivery, the number of the attempt in which it died. The job then needs a new attempt. 0: the
    model server did not die.

    ``alone``: True if the model has no other request in flight. If an earlier attempt of a job was lost, the
    job may run only alone. So a second loss shows that this job is the cause.
    """

    id: bytes
    worker: str
    redelivered: bool
    frame_attempt: int
    token: bytes = b""
    lost: int = 0
    alone: bool = True


class Taken(NamedTuple):
    """The answer to a :class:`Take`. ``outcome`` has one of these values:

    - ``run``: the worker must run the job now. ``attempt`` is the number of this attempt.
    - ``drop``: the job is over, or another worker has it.
    - ``failed``, ``expired``: the job has just failed or expired.
    - ``suspect``: the job may run only alone, and its record is unchanged. The worker sends the :class:`Take`
      again when the model has no other request in flight.

    For ``run`` and ``suspect``, the worker does not ack the job's message yet. For the other values, it acks
    the message.
    """

    outcome: Outcome
    attempt: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an attempt.

    ``reply``: the reply frame; empty: no reply. ``compute_us``: the time of the whole model call.
    ``used_us``: this job's part of that time, which is added to the caller's usage.
    """

    id: bytes
    attempt: int
    state: Terminal
    reply: bytes = b""
    error: dict[str, str] | None = None
    wait_us: int = 0
    compute_us: int = 0
    used_us: int = 0
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True, slots=True)
class JobLoad:
    """The unfinished jobs of one Deployment."""

    waiting: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of all records, in one consistent view.

    ``states``: the number of records in each state. ``ledger``: totals since the store was created: accepted,
    succeeded, failed, cancelled, expired, removed. A total of zero may be missing. ``acknowledged``: the
    number of 202 answers that each gateway process has reported.

    ``watched``: the number of jobs that the broker has not confirmed, or for which a worker holds a lease.
    Perhaps no queue has a message for such a job. So the router checks whether the job is overdue.
    """

    states: dict[State, int]
    deployments: dict[str, JobLoad]
    ledger: dict[str, int]
    acknowledged: dict[str, int]
    watched: int = 0

    @property
    def unfinished(self) -> int:
        """The number of unfinished jobs."""
        return sum(count for state, count in self.states.items() if state not in TERMINAL)


def ahead(rank: int, level: Level, waiting: Mapping[Level, int]) -> int:
    """Estimate the number of jobs that workers take before the job at position ``rank`` of its level.

    ``rank`` counts from 0. ``waiting``: the number of waiting jobs of each level. For each job of this level,
    workers take ``WEIGHTS[other] / WEIGHTS[level]`` jobs of every other level, as long as some wait.
    """
    found = float(rank)
    for other, count in waiting.items():
        if other != level:
            found += min(float(count), rank * WEIGHTS[other] / WEIGHTS[level])
    return int(found)


def iso(ms: int) -> str | None:
    """Return milliseconds since the epoch as ISO 8601 in UTC, or None for 0."""
    return f"{_second(ms // 1000)}.{ms % 1000:03d}Z" if ms else None


@lru_cache(maxsize=1024)
def _second(seconds: int) -> str:
    # Cached, because an answer about a job contains several timestamps, and most of them are from the last
    # few seconds.
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")

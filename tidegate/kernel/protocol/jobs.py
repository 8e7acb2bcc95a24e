"""Durable jobs as values: what is known of one, and what becomes of it. Pure.

    accepting -> queued -> running -> succeeded | failed | cancelled | expired

``accepting``: recorded, the broker has not confirmed its message yet; to the outside that is ``queued``. A
lost worker's job goes from ``running`` to ``running`` as its next attempt. The first terminal state wins.
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

# How many jobs of a level a worker takes while all of them wait: none of them starves.
WEIGHTS: Mapping[Level, int] = {"high": 16, "normal": 4, "low": 1}
MAX_ATTEMPTS = 3

ID_SIZE = 16
_ENTROPY_SIZE = 10


def new_id(now_ms: int, entropy: bytes) -> bytes:
    """A job's id: 48 bits of milliseconds since the epoch and 80 random bits (``entropy``, 10 bytes).

    So ids sort by creation. It is the id of the request's frame too.
    """
    if len(entropy) != _ENTROPY_SIZE:
        raise ValueError(f"{_ENTROPY_SIZE} random bytes are wanted, got {len(entropy)}")
    return now_ms.to_bytes(6, "big") + entropy


def read_id(text: str) -> bytes | None:
    """The id that 32 hex digits stand for (as they are shown: lower case); None for anything else."""
    if len(text) != 2 * ID_SIZE or not all(c in "0123456789abcdef" for c in text):
        return None
    return bytes.fromhex(text)


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A caller's word that a request is an earlier one again. ``body``: the sha256 of what was asked."""

    key: str
    body: bytes


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job to accept. ``frame`` is its request frame, with the same id, attempt 0 and the job's deadline.

    Times are milliseconds since the epoch. ``ask`` is what its caller wants back, for whoever encodes the
    result. ``retry_safe`` must agree with the frame's flag.
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
    """``fresh`` False: the job of an earlier call with the same idempotency key."""

    id: bytes
    fresh: bool


@dataclass(frozen=True, slots=True)
class Job:
    """What is known of a job. Times are milliseconds since the epoch, 0: it has not happened.

    ``attempt`` counts from 1 once it runs. ``wait_us`` and ``compute_us`` are the worker's: the wait there,
    and the model call. ``result_size`` is the bytes of its reply frame.
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
        """Whether nothing happens to it any more."""
        return self.state in TERMINAL

    @property
    def status(self) -> str:
        """Its state as the outside sees it."""
        return "queued" if self.state == "accepting" else self.state

    def public(self) -> dict[str, Any]:
        """The job as a client sees it; times in ISO 8601, UTC, parts of time in milliseconds."""
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
    """A line of a job's log; ``seq`` counts from 1, ``at_ms`` is milliseconds since the epoch.

    ``detail``: the worker of a `running`, the reason of a failure.
    """

    seq: int
    at_ms: int
    state: State
    attempt: int
    detail: str = ""

    def public(self) -> dict[str, Any]:
        """The event as a client sees it."""
        shown = {"status": "queued" if self.state == "accepting" else self.state, "at": iso(self.at_ms)}
        extra = {"worker" if self.state == "running" else "reason": self.detail} if self.detail else {}
        return {**shown, "attempt": self.attempt, **extra}


class Take(NamedTuple):
    """A worker's wish to run a job now.

    ``frame_attempt`` is that of the delivered frame. ``token`` is the delivery's own, random: a wish that is
    repeated, because its answer was lost, is the same attempt; except that ``lost`` is the attempt of this
    very delivery that was lost, with the model server under it.

    ``alone``: nothing else is in the model, so a job that was lost before may run. A loss beside others
    convicts nobody.
    """

    id: bytes
    worker: str
    redelivered: bool
    frame_attempt: int
    token: bytes = b""
    lost: int = 0
    alone: bool = True


class Taken(NamedTuple):
    """``run``: go on, as ``attempt``. ``drop``: it is over or somebody else's. ``failed``, ``expired``: it
    has just become that. ``suspect``: nothing has changed; take it again when nothing else is in the model.
    All but ``run`` and ``suspect``: ack and forget.
    """

    outcome: Outcome
    attempt: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of an attempt. ``reply`` is the reply frame (empty: none).

    ``compute_us`` is the time of the model call, ``used_us`` the job's own part of it, which counts as usage,
    as do the tokens that the model read and wrote.
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
    """The jobs of one Deployment that are not over."""

    waiting: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class Counts:
    """All records in one consistent view.

    ``states``: records by state. ``ledger``: totals since the store was made: accepted, succeeded, failed,
    cancelled, expired, removed; one that was never counted is not there. ``acknowledged``: the 202s that each
    gateway process says it gave.
    ``watched``: jobs that somebody looks after by the clock, not by a message: not confirmed yet, or leased.
    """

    states: dict[State, int]
    deployments: dict[str, JobLoad]
    ledger: dict[str, int]
    acknowledged: dict[str, int]
    watched: int = 0

    @property
    def unfinished(self) -> int:
        """Jobs that are not over."""
        return sum(count for state, count in self.states.items() if state not in TERMINAL)


def ahead(rank: int, level: Level, waiting: Mapping[Level, int]) -> int:
    """About how many jobs will be taken before one that is the ``rank``-th (from 0) of its level.

    Workers take by weight: for each of its own level, ``weight / own weight`` of every other.
    """
    found = float(rank)
    for other, count in waiting.items():
        if other != level:
            found += min(float(count), rank * WEIGHTS[other] / WEIGHTS[level])
    return int(found)


def iso(ms: int) -> str | None:
    """Milliseconds since the epoch as ISO 8601 in UTC; None for 0."""
    return f"{_second(ms // 1000)}.{ms % 1000:03d}Z" if ms else None


@lru_cache(maxsize=1024)
def _second(seconds: int) -> str:
    # Every answer about a job has several times, most of them of the last few seconds.
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")

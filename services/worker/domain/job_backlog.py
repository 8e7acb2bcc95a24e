"""The jobs that wait for a model call, and the choice of the jobs that share the next call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.worker.domain.backlog import CallKeyQueue, key_of
from tidegate.kernel.protocol.envelope import CLAIM, Request
from tidegate.kernel.protocol.jobs import LEVELS, WEIGHTS, Level


@dataclass(slots=True, eq=False)
class QueuedJob:
    """A job that this worker has, with its delivery. Times are in seconds of the worker's monotonic clock.

    ``received``: when the job first arrived here; ``delivered``: when its last delivery arrived.
    ``started``: the job was chosen for a call. ``attempt``: its attempt here; 0 before the first one.
    ``lost_attempt``: the attempt in which the model server died; 0 means none.
    ``take_pending``: the store has not confirmed yet that the job's record is ``running`` here.
    ``leased_at``: when its lease was last confirmed; None: it has no lease. A leased job has no delivery.
    ``read_at``: when its record was last read.
    ``ended``: this worker no longer runs the job; the end may not be recorded yet.
    ``upstream_since``: when its upstream first failed to answer; None: the upstream has not failed.
    ``waits``: the job waits for its upstream or engine, and no call of it runs.
    """

    request: Request
    level: Level
    channel: object
    tag: int
    redelivered: bool
    token: bytes
    received: float
    delivered: float
    started: bool = False
    attempt: int = 0
    lost_attempt: int = 0
    take_pending: bool = False
    leased_at: float | None = None
    read_at: float = 0.0
    ended: bool = False
    upstream_since: float | None = None
    waits: bool = False

    def set_attempt(self, attempt: int, now: float) -> None:
        """Set the number of the attempt that now runs here, as in the job's record."""
        self.attempt, self.read_at = attempt, now
        self.request = self.request._replace(attempt=min(attempt, 255))

    @property
    def id(self) -> bytes:
        """Return the job's id."""
        return self.request.id


def call_parameters(group: Sequence[QueuedJob]) -> dict[str, str]:
    """Return parameters for the model that list the call's jobs, in the order of their rows."""
    return {"tidegate_jobs": ",".join(f"{j.id.hex()}:{j.attempt}:{j.request.rows}" for j in group)}


# A level without jobs may save up this many turns, because its next job may arrive soon.
CREDIT = 1.0


class JobBacklog:
    """A queue for each level. Levels share the calls by weight, and no level starves.

    This is start-time fair queueing. The next level is the one with the fewest served jobs per weight. A
    level without jobs saves up at most ``CREDIT`` turns.
    """

    def __init__(self) -> None:
        self._queues: dict[Level, CallKeyQueue[QueuedJob]] = {level: CallKeyQueue(_key) for level in LEVELS}
        self._served: dict[Level, float] = dict.fromkeys(LEVELS, 0.0)
        self._clock = 0.0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: QueuedJob) -> None:
        """Queue a job at its level."""
        queue = self._queues[job.level]
        if not queue:
            self._served[job.level] = max(self._served[job.level], self._clock - CREDIT)
        queue.add(job)
        self._count += 1

    def take(self, max_rows: int) -> list[QueuedJob]:
        """Remove and return the jobs of the next call. They have one key, and up to ``max_rows`` rows.

        If the first job has more rows, it is returned alone.
        """
        waiting = [level for level in LEVELS if self._queues[level]]
        if not waiting:
            return []
        first = min(waiting, key=lambda level: self._served[level])
        self._clock = max(self._clock, self._served[first])
        group = self._serve(first, self._queues[first].take(max_rows))
        key, free_rows = _key(group[0]), max_rows - sum(job.request.rows for job in group)
        for level in LEVELS:
            more = self._serve(level, self._queues[level].take_more(key, free_rows))
            free_rows -= sum(job.request.rows for job in more)
            group += more
        return group

    def remove(self, chosen: Callable[[QueuedJob], bool]) -> list[QueuedJob]:
        """Remove and return the jobs for which ``chosen`` returns True."""
        removed = [job for queue in self._queues.values() for job in queue.remove(chosen)]
        self._count -= len(removed)
        return removed

    def _serve(self, level: Level, group: list[QueuedJob]) -> list[QueuedJob]:
        self._served[level] += len(group) / WEIGHTS[level]
        self._count -= len(group)
        return group


def _key(job: QueuedJob) -> bytes:
    # A job with tensors in the blob store is large, so it gets a separate call.
    request = job.request
    return request.id + request.key if request.flags & CLAIM else key_of(job)

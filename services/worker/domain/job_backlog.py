"""The jobs that wait for a model call, and the choice of the jobs that share the next call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.worker.domain.backlog import CallKeyQueue, key_of
from tidegate.kernel.protocol.envelope import CLAIM, Request
from tidegate.kernel.protocol.jobs import LEVELS, WEIGHTS, Level


@dataclass(slots=True, eq=False)
class QueuedJob:
    """A job that this worker has received. Times are in seconds of the worker's monotonic clock.

    - ``received``: when the job first arrived here
    - ``delivered``: when its last delivery arrived
    - ``started``: True if the job was chosen for a call
    - ``attempt``: the number of the attempt that runs here; 0 before the first attempt
    - ``lost_attempt``: the number of the attempt in which the model server died; 0: none
    - ``take_pending``: True after this worker asked the store to set the job to ``running``, until the
      store answers
    - ``leased_at``: when the job's lease was last confirmed; None: the job has no lease. If a job
      has a lease, its delivery is already settled
    - ``read_at``: when the job's record was last read from the store
    - ``ended``: True if this worker no longer runs the job. The store may not know this yet
    - ``upstream_since``: when the job's upstream first failed to answer; None: it has not failed
    - ``waits``: True while the job waits for its upstream or engine, and no call runs the job
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
        """Set the attempt number that was read from the job's record at the time ``now``."""
        self.attempt, self.read_at = attempt, now
        self.request = self.request._replace(attempt=min(attempt, 255))

    @property
    def id(self) -> bytes:
        """Return the job's id."""
        return self.request.id


def call_parameters(group: Sequence[QueuedJob]) -> dict[str, str]:
    """Return the parameter ``tidegate_jobs`` of a call: each job's id, attempt number and rows."""
    return {"tidegate_jobs": ",".join(f"{j.id.hex()}:{j.attempt}:{j.request.rows}" for j in group)}


# A level is a priority of jobs. When a level that was empty gets jobs, it may start up to this many jobs per
# unit of its weight before the other levels. So its next job starts soon, but the level cannot block the
# other levels for long.
CREDIT = 1.0


class JobBacklog:
    """The jobs that wait for a call, in one queue for each level. Levels share the calls by weight.

    This is start-time fair queueing: the next level is the one with the fewest served jobs per weight. So no
    level starves. A level that was empty gets an advance of at most ``CREDIT`` jobs per unit of its weight.
    """

    def __init__(self) -> None:
        self._queues: dict[Level, CallKeyQueue[QueuedJob]] = {level: CallKeyQueue(_key) for level in LEVELS}
        self._served: dict[Level, float] = dict.fromkeys(LEVELS, 0.0)
        self._clock = 0.0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: QueuedJob) -> None:
        """Add a job to the queue of its level."""
        queue = self._queues[job.level]
        if not queue:
            self._served[job.level] = max(self._served[job.level], self._clock - CREDIT)
        queue.add(job)
        self._count += 1

    def take(self, max_rows: int) -> list[QueuedJob]:
        """Remove and return the jobs of the next call.

        Jobs can share a call only if their call keys are equal. Together they have at most ``max_rows`` rows.
        If the first job has more rows, it is returned alone. If no job waits, the result is empty.
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

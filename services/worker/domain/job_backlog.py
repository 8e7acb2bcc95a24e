"""The jobs in hand, and which of them go into the next model call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.worker.domain.backlog import CallKeyQueue, key_of
from tidegate.kernel.protocol.envelope import CLAIM, Request
from tidegate.kernel.protocol.jobs import LEVELS, WEIGHTS, Level


@dataclass(slots=True, eq=False)
class QueuedJob:
    """A job in hand and its delivery. Times are on the worker's monotonic clock, in seconds.

    ``received``: when it came; ``delivered``: when its last delivery did. ``attempt`` 0: it waits. ``lost``
    is its attempt under which the model server died. ``asked``: it was asked for and the answer is not here
    (yet), so its record may say that it runs here, as an attempt that is not known here. ``leased_at``: when
    its record was last told that it is ours, with no delivery. ``seen_at``: when its record was last read.
    ``over``: nothing is computed for it any more; its end may still have to be recorded.
    """

    request: Request
    level: Level
    channel: object
    tag: int
    redelivered: bool
    token: bytes
    received: float
    delivered: float
    begun: bool = False
    attempt: int = 0
    lost: int = 0
    asked: bool = False
    leased_at: float | None = None
    seen_at: float = 0.0
    over: bool = False

    def taken(self, attempt: int, now: float) -> None:
        """Note that its record says that it runs here, as ``attempt``."""
        self.attempt, self.seen_at = attempt, now
        self.request = self.request._replace(attempt=min(attempt, 255))

    @property
    def id(self) -> bytes:
        """The job's id."""
        return self.request.id


# What a level that had nothing in hand may make up for, in rounds: its next job may be on its way.
CREDIT = 1.0


class JobBacklog:
    """A line for each level. Levels are served by weight: none starves, and an idle one saves nothing up.

    It is start-time fair queueing: the level that was served least, in jobs divided by its weight, is next.
    """

    def __init__(self) -> None:
        self._lines: dict[Level, CallKeyQueue[QueuedJob]] = {level: CallKeyQueue(_key) for level in LEVELS}
        self._served: dict[Level, float] = dict.fromkeys(LEVELS, 0.0)
        self._clock = 0.0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, job: QueuedJob) -> None:
        """Put a job into the line of its level."""
        line = self._lines[job.level]
        if not line:
            self._served[job.level] = max(self._served[job.level], self._clock - CREDIT)
        line.add(job)
        self._count += 1

    def take(self, max_rows: int) -> list[QueuedJob]:
        """The next call: jobs of one key, up to ``max_rows`` rows, at least one job."""
        waiting = [level for level in LEVELS if self._lines[level]]
        if not waiting:
            return []
        first = min(waiting, key=lambda level: self._served[level])
        self._clock = max(self._clock, self._served[first])
        group = self._serve(first, self._lines[first].take(max_rows))
        key, room = _key(group[0]), max_rows - sum(job.request.rows for job in group)
        for level in LEVELS:
            more = self._serve(level, self._lines[level].more(key, room))
            room -= sum(job.request.rows for job in more)
            group += more
        return group

    def remove(self, gone: Callable[[QueuedJob], bool]) -> list[QueuedJob]:
        """Take out those that ``gone`` says; gives them."""
        found = [job for line in self._lines.values() for job in line.remove(gone)]
        self._count -= len(found)
        return found

    def _serve(self, level: Level, group: list[QueuedJob]) -> list[QueuedJob]:
        self._served[level] += len(group) / WEIGHTS[level]
        self._count -= len(group)
        return group


def _key(job: QueuedJob) -> bytes:
    # What is in the blob store is large: one of those at a time.
    request = job.request
    return request.id + request.key if request.flags & CLAIM else key_of(job)

"""Group the frequent transitions of jobs: concurrent transitions of one kind share one script call."""

from __future__ import annotations

from typing import NamedTuple

from tidegate.kernel.protocol.jobs import Take, Taken
from tidegate.kernel.store import records
from tidegate.kernel.store.grouping import Grouped
from tidegate.kernel.store.records import Arguments
from tidegate.kernel.store.scripts import Argument, Scripts


class JobLease(NamedTuple):
    """The lease that a worker wants for a job. ``until_ms``: its end, in milliseconds since the epoch."""

    id: bytes
    attempt: int
    worker: str
    until_ms: int


class JobWait(NamedTuple):
    """A worker's report that a job's attempt starts or stops waiting for its upstream or engine.

    ``waits``: True if the waiting starts.
    """

    id: bytes
    attempt: int
    waits: bool


class Transitions:
    """The script calls of :class:`tidegate.kernel.store.jobs.JobStore`, grouped by kind of transition.

    The calling code encodes the user data of a job before the job joins a group. So an encoding error affects
    only this job, and not the other jobs of the group.
    """

    def __init__(self, scripts: Scripts) -> None:
        self._scripts = scripts
        self.accept: Grouped[Arguments, bytes] = Grouped(self._accept, _size)
        self.queued: Grouped[bytes, None] = Grouped(self._queued)
        self.take: Grouped[Take, Taken] = Grouped(self._take)
        self.finish: Grouped[Arguments, bool] = Grouped(self._finish, _size)
        self.lease: Grouped[JobLease, bool] = Grouped(self._lease)
        self.waits: Grouped[JobWait, bool] = Grouped(self._waits)

    async def stop(self) -> None:
        """Wait until every call has its answer."""
        await self.accept.stop()
        await self.queued.stop()
        await self.take.stop()
        await self.finish.stop()
        await self.lease.stop()
        await self.waits.stop()

    async def _accept(self, group: list[Arguments]) -> list[bytes]:
        found: list[bytes] = await self._scripts.run("accept", [part for one in group for part in one])
        return found

    async def _queued(self, group: list[bytes]) -> list[None]:
        await self._scripts.run("queued", list(group))
        return [None] * len(group)

    async def _take(self, group: list[Take]) -> list[Taken]:
        arguments: list[Argument] = []
        for take in group:
            arguments += (take.id, take.worker, int(take.redelivered), take.frame_attempt)
            arguments += (take.token, take.lost, int(take.alone))
        found: bytes = await self._scripts.run("take", arguments)
        return [records.taken(one) for one in found.decode().split(",")]

    async def _finish(self, group: list[Arguments]) -> list[bool]:
        found: bytes = await self._scripts.run("finish", [part for one in group for part in one])
        return [one == ord("y") for one in found]

    async def _lease(self, group: list[JobLease]) -> list[bool]:
        arguments: list[Argument] = [part for lease in group for part in lease]
        found: bytes = await self._scripts.run("lease", arguments)
        return [one == ord("y") for one in found]

    async def _waits(self, group: list[JobWait]) -> list[bool]:
        arguments: list[Argument] = []
        for wait in group:
            arguments += (wait.id, wait.attempt, int(wait.waits))
        found: bytes = await self._scripts.run("waits", arguments)
        return [one == ord("y") for one in found]


def _size(arguments: Arguments) -> int:
    return sum(len(part) for part in arguments if isinstance(part, bytes))

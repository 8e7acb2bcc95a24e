"""Find accepted jobs, wait for them, and cancel them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from services.gateway.adapters.job_queue import JobQueue
from tidegate.kernel.errors import NotFound
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.jobs import Job
from tidegate.kernel.store import JobStore

POLL_S = 2.0


class JobTracker:
    """Finds, awaits and cancels the jobs in the store. ``queue`` sends cancellations to the workers."""

    def __init__(self, store: JobStore, queue: JobQueue) -> None:
        self._queue = queue
        self.store = store

    async def get(self, id_: bytes) -> Job:
        """Return a job. Raises NotFound."""
        job = await self.store.get(id_)
        if job is None:
            raise _not_found(id_)
        return job

    async def find(self, id_: bytes, principal: Principal) -> Job:
        """Return a job. Raises NotFound, unless ``principal`` is its owner or has the scope ``admin``."""
        job = await self.store.get(id_)
        if job is None or not principal.sees(job.principal):
            raise _not_found(id_)
        return job

    async def position(self, job: Job) -> int | None:
        """Return about how many jobs are ahead of this one, or None if it is not queued."""
        return await self.store.position(job) if job.status == "queued" else None

    async def wait(self, id_: bytes, timeout_s: float) -> Job:
        """Return a job when it has ended, or after at most ``timeout_s`` seconds. Raises NotFound."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self.store.watch().changes(id_) as notices:
                job = await self.get(id_)
                while not job.terminal:
                    # Notices can be lost with the connection, so the record is also read at intervals.
                    left = max(0.001, min(POLL_S, deadline - asyncio.get_running_loop().time()))
                    with suppress(TimeoutError):
                        await asyncio.wait_for(anext(notices), left)
                    job = await self.get(id_)
                return job
        return await self.get(id_)

    async def cancel(self, job: Job) -> Job:
        """Cancel a job, and return it. A job that has already ended keeps its state."""
        after = await self.store.cancel(job.id)
        if after is None:
            raise _not_found(job.id)
        if after.state == "cancelled" and not job.terminal:
            await self._queue.cancel([job.id])
        return after

    async def cancel_all(self, ids: Sequence[bytes]) -> None:
        """Cancel several jobs. A job that has already ended keeps its state."""
        after = await asyncio.gather(*(self.store.cancel(id_) for id_ in ids))
        await self._queue.cancel([job.id for job in after if job is not None and job.state == "cancelled"])


def _not_found(id_: bytes) -> NotFound:
    return NotFound(f"there is no job {id_.hex()}: GET /v1/jobs lists your jobs")

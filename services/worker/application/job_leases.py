"""Jobs that take longer than the broker lets a message be held, or whose session has ended under them.

Their records say then that they are this worker's, until a time that is pushed on as long as it lives; their
messages are acked. A lease that lapses is for the router, which publishes the job again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from services.worker.adapters.metrics import LEASES
from services.worker.application.job_scheduler import Door, JobScheduler
from services.worker.domain.job_backlog import QueuedJob
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

LEASE_S = 30.0
RENEW_S = 10.0
LOOK_S = 1.0
STOP_S = 1.0


class JobLeases:
    """Looks at the running jobs once a second. ``ack_timeout_s``: how long a message may be held.

    A job whose end is on its way to its record is kept too: that may have to wait, for the blob store.
    """

    def __init__(
        self, store: JobStore, jobs: JobScheduler, door: Door, replica: str, *, ack_timeout_s: float
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._door = door
        self._replica = replica
        self._hold_s = ack_timeout_s / 2
        self._look_s = min(LOOK_S, ack_timeout_s / 10)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name="leases")

    async def stop(self) -> None:
        """End; what is still leased is given up, so that it goes on elsewhere at once."""
        await tasks.end(self._task)
        leased = [job for job in self._jobs.by_id.values() if job.leased_at is not None]
        try:
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(self._lease(job, 0.0) for job in leased))
        except (TimeoutError, StoreUnavailable):
            log.warning("leases were not given up; they lapse", extra={"jobs": len(leased)})

    async def _run(self) -> None:
        away = False
        while True:
            await asyncio.sleep(self._look_s)
            try:
                await self._round()
                away = False
            except StoreUnavailable as error:
                if not away:
                    log.warning("jobs cannot be leased; trying on", extra={"problem": error.message})
                away = True

    async def _round(self) -> None:
        now = time.monotonic()
        running = [job for job in self._jobs.by_id.values() if job.attempt and not job.asked]
        wanted = [job for job in running if self._wants(job, now)]
        attempts = [job.attempt for job in wanted]
        kept = await asyncio.gather(*(self._lease(job, LEASE_S) for job in wanted))
        for job, attempt, ours in zip(wanted, attempts, kept, strict=True):
            if self._is_same(job, attempt):
                self._leased(job, ours, now)
        seen = [h for h in running if h.leased_at is None and now - h.seen_at >= RENEW_S and not h.asked]
        await self._look([job for job in seen if not job.over], now)

    def _is_same(self, job: QueuedJob, attempt: int) -> bool:
        """Whether it is still in hand as the attempt that its record was asked about."""
        return self._jobs.by_id.get(job.id) is job and job.attempt == attempt and not job.asked

    def _wants(self, job: QueuedJob, now: float) -> bool:
        if job.leased_at is not None:
            return now - job.leased_at >= RENEW_S
        return now - job.delivered >= self._hold_s or not self._door.is_open(job)

    async def _lease(self, job: QueuedJob, lease_s: float) -> bool:
        until_ms = int((time.time() + lease_s) * 1e3)
        return await self._store.lease(job.id, job.attempt, self._replica, until_ms)

    def _leased(self, job: QueuedJob, ours: bool, now: float) -> None:
        if not ours:
            if not job.over:  # else whoever records its end hears the same
                self._jobs.lose(job)
            return
        if job.leased_at is None:
            LEASES.inc()
            self._door.settle([job])
        job.leased_at = now

    async def _look(self, running: Sequence[QueuedJob], now: float) -> None:
        """The word that a job was cancelled may be lost; its record is not."""
        if not running:
            return
        attempts = [job.attempt for job in running]
        found = await self._store.get_many([job.id for job in running])
        for job, attempt, record in zip(running, attempts, found, strict=True):
            job.seen_at = now
            gone = record is None or record.terminal or record.attempt != attempt
            if gone and not job.over and self._is_same(job, attempt):
                self._jobs.lose(job)

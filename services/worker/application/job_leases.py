"""Lease jobs that run too long, jobs that wait, and jobs whose message has lost its channel.

A lease is a time in the job's record. Until that time, only this worker may run the job. After the first
lease, the worker acks the job's message. It renews the lease until the job's end is recorded. If a lease
expires, the router publishes the job again.

A job runs too long when half of the broker's ack timeout has passed since its delivery. A job waits while its
upstream or its engine cannot run it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from services.worker.adapters.metrics import LEASES
from services.worker.application.job_deliveries import JobDeliveries
from services.worker.application.job_scheduler import JobScheduler
from services.worker.domain.job_backlog import QueuedJob
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

LEASE_S = 30.0
RENEW_S = 10.0
CHECK_S = 1.0
STOP_S = 1.0


class JobLeases:
    """Check once a second which running jobs need a lease, and lease them.

    ``ack_timeout_s`` is the longest time, in seconds, for which the broker lets a message stay unacked. A job
    keeps its lease until its end is recorded. To record the end may take long, because a large result waits
    until the blob store answers.
    """

    def __init__(
        self,
        store: JobStore,
        jobs: JobScheduler,
        deliveries: JobDeliveries,
        replica: str,
        *,
        ack_timeout_s: float,
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._deliveries = deliveries
        self._replica = replica
        self._max_unacked_s = ack_timeout_s / 2
        self._check_s = min(CHECK_S, ack_timeout_s / 10)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to lease jobs."""
        self._task = asyncio.create_task(self._run(), name="leases")

    async def stop(self) -> None:
        """Stop, and release all leases, so that other workers can get the jobs without delay."""
        await tasks.end(self._task)
        leased = [job for job in self._jobs.by_id.values() if job.leased_at is not None]
        try:
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(self._lease(job, 0.0) for job in leased))
        except (TimeoutError, StoreUnavailable):
            log.warning("leases of jobs were not released; they will expire", extra={"jobs": len(leased)})

    async def _run(self) -> None:
        unavailable = False
        while True:
            await asyncio.sleep(self._check_s)
            try:
                await self._check()
                unavailable = False
            except StoreUnavailable as error:
                if not unavailable:
                    log.warning(
                        "jobs cannot be leased; the worker tries again", extra={"problem": error.message}
                    )
                unavailable = True

    async def _check(self) -> None:
        now = time.monotonic()
        running = [job for job in self._jobs.by_id.values() if job.attempt and not job.take_pending]
        due = [job for job in running if self._is_due(job, now)]
        attempts = [job.attempt for job in due]
        kept = await asyncio.gather(*(self._lease(job, LEASE_S) for job in due))
        for job, attempt, ours in zip(due, attempts, kept, strict=True):
            if self._is_current(job, attempt):
                self._apply(job, ours, now)
        unread = [
            job
            for job in running
            if job.leased_at is None and now - job.read_at >= RENEW_S and not job.take_pending
        ]
        await self._read_records([job for job in unread if not job.ended], now)

    def _is_current(self, job: QueuedJob, attempt: int) -> bool:
        """Return True if this worker still has the job, in the same attempt.

        The calling code must check this after each wait for the store, because the job may have changed
        during the wait.
        """
        return self._jobs.by_id.get(job.id) is job and job.attempt == attempt and not job.take_pending

    def _is_due(self, job: QueuedJob, now: float) -> bool:
        if job.leased_at is not None:
            return now - job.leased_at >= RENEW_S
        # Lease a waiting job immediately, because its wait may be long. Without a lease, its message would
        # stay unacked. Then each restart of the host would cause a redelivery, and the number of deliveries
        # is limited.
        return job.waits or now - job.delivered >= self._max_unacked_s or not self._deliveries.can_ack(job)

    async def _lease(self, job: QueuedJob, lease_s: float) -> bool:
        until_ms = int((time.time() + lease_s) * 1e3)
        return await self._store.lease(job.id, job.attempt, self._replica, until_ms)

    def _apply(self, job: QueuedJob, ours: bool, now: float) -> None:
        """Handle the store's answer to the request for a job's lease.

        ``ours``: True if the store gave the lease to this worker. If it is False, drop the job, unless the
        job has ended. After the job's first lease, ack its message.
        """
        if not ours:
            if not job.ended:  # an ended job is forgotten when the store has recorded its end
                self._jobs.drop_lost(job)
            return
        if job.leased_at is None:
            LEASES.inc()
            self._deliveries.ack([job])
        job.leased_at = now

    async def _read_records(self, running: Sequence[QueuedJob], now: float) -> None:
        """Read the jobs' records, and drop each job whose record says that this worker must not run it.

        So a cancelled job ends even if its cancel message was lost.
        """
        if not running:
            return
        attempts = [job.attempt for job in running]
        records = await self._store.get_many([job.id for job in running])
        for job, attempt, record in zip(running, attempts, records, strict=True):
            job.read_at = now
            gone = record is None or record.terminal or record.attempt != attempt
            if gone and not job.ended and self._is_current(job, attempt):
                self._jobs.drop_lost(job)

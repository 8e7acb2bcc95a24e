"""Jobs that take longer than the broker lets a message be held, or whose session has ended under them.

Their records say then that they are this worker's, until a time that is pushed on as long as it lives; their
messages are acked. A lease that lapses is for the router, which publishes the job again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from services.worker.adapters.metrics import LEASES
from services.worker.application.jobs import Door, Jobs
from services.worker.domain.job_backlog import Held
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.store import JobStore, StoreUnavailable

log = telemetry.logger(__name__)

LEASE_S = 30.0
RENEW_S = 10.0
LOOK_S = 1.0
STOP_S = 1.0


class Leases:
    """Looks at the running jobs once a second. ``ack_timeout_s``: how long a message may be held.

    A job whose end is on its way to its record is kept too: that may have to wait, for the blob store.
    """

    def __init__(
        self, store: JobStore, jobs: Jobs, door: Door, replica: str, *, ack_timeout_s: float
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
        leased = [held for held in self._jobs.held.values() if held.leased_at is not None]
        try:
            async with asyncio.timeout(STOP_S):
                await asyncio.gather(*(self._lease(held, 0.0) for held in leased))
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
        running = [held for held in self._jobs.held.values() if held.attempt and not held.asked]
        wanted = [held for held in running if self._wants(held, now)]
        attempts = [held.attempt for held in wanted]
        kept = await asyncio.gather(*(self._lease(held, LEASE_S) for held in wanted))
        for held, attempt, ours in zip(wanted, attempts, kept, strict=True):
            if self._is_same(held, attempt):
                self._leased(held, ours, now)
        seen = [h for h in running if h.leased_at is None and now - h.seen_at >= RENEW_S and not h.asked]
        await self._look([held for held in seen if not held.over], now)

    def _is_same(self, held: Held, attempt: int) -> bool:
        """Whether it is still in hand as the attempt that its record was asked about."""
        return self._jobs.held.get(held.id) is held and held.attempt == attempt and not held.asked

    def _wants(self, held: Held, now: float) -> bool:
        if held.leased_at is not None:
            return now - held.leased_at >= RENEW_S
        return now - held.delivered >= self._hold_s or not self._door.is_open(held)

    async def _lease(self, held: Held, lease_s: float) -> bool:
        until_ms = int((time.time() + lease_s) * 1e3)
        return await self._store.lease(held.id, held.attempt, self._replica, until_ms)

    def _leased(self, held: Held, ours: bool, now: float) -> None:
        if not ours:
            if not held.over:  # else whoever records its end hears the same
                self._jobs.lose(held)
            return
        if held.leased_at is None:
            LEASES.inc()
            self._door.settle([held])
        held.leased_at = now

    async def _look(self, running: Sequence[Held], now: float) -> None:
        """The word that a job was cancelled may be lost; its record is not."""
        if not running:
            return
        attempts = [held.attempt for held in running]
        found = await self._store.get_many([held.id for held in running])
        for held, attempt, job in zip(running, attempts, found, strict=True):
            held.seen_at = now
            gone = job is None or job.terminal or job.attempt != attempt
            if gone and not held.over and self._is_same(held, attempt):
                self._jobs.lose(held)

"""Sweep the jobs: publish lost messages again, end expired jobs, and remove old records.

The message of a job is lost if it is in no queue and no worker has the job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from prometheus_client import Counter, Gauge

from services.router.application.dead_letters import DeadLetters
from services.router.domain.dead_letters import DeadLetter
from services.router.domain.exceptions import EXHAUSTED, NOT_RETRIED
from services.router.domain.job_retention import Retention, StoreSize
from tidegate.kernel import telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Unroutable
from tidegate.kernel.broker.topology import CANCELS, jobs_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import Job
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store.jobs import JobStore

log = telemetry.logger(__name__)

# The error reasons of failed jobs that become dead letters, each with the cause of the dead letter.
DEAD_LETTER_CAUSES = {"attempts_exhausted": EXHAUSTED, "worker_lost": NOT_RETRIED}
BATCH = 500
# Only jobs that are at least this old (in milliseconds) are checked for a lost message. The message of a
# younger job may not be in the queue yet.
LOST_AFTER_MS = 10_000

REPUBLISHED = Counter(
    "tidegate_jobs_republished_total", "Jobs with a message that was published again.", ["state"]
)
EXPIRED = Counter("tidegate_jobs_expired_total", "Jobs that expired before they ended.")
RETIRED = Counter("tidegate_jobs_retired_total", "Job records removed by age, number or memory.")
STORE_BYTES = Gauge(
    "tidegate_jobs_store_bytes", "Memory of the store of the jobs, as last read by the router."
)
# The store's memory is read once in this many rounds.
MEMORY_EVERY = 5


class JobSweeper:
    """One of the router's loops. It sweeps jobs while this router leads.

    Each step is correct even if two routers run it.
    """

    def __init__(
        self,
        jobs: JobStore,
        amqp_url: str,
        lost: Callable[[], Mapping[str, bool]],
        *,
        interval_s: float,
        retention: Retention,
        leads: Callable[[], bool],
        letters: DeadLetters | None = None,
    ) -> None:
        """``lost``: a function that returns the Deployments that lost messages (``Ledger.take_lost``).

        ``letters``: the dead letters. A failed job that will not be retried is added to them. None: no job is
        added.
        """
        self._jobs = jobs
        self._lost = lost
        self._interval_s = interval_s
        self._retention = retention
        self._rounds = 0
        self._full = False
        self._leads = leads
        self._letters = letters
        self._declared: set[str] = set()
        self._loop = RepeatingTask("job sweeper", self._step, retry_s=interval_s)
        self.problem: str | None = None
        self.out = Connection(amqp_url, "router-jobs", self._on_setup, on_up=self._declared.clear)

    def start(self) -> None:
        """Start the loop."""
        self.out.start()
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop and disconnect."""
        await self._loop.stop()
        await self.out.stop()

    async def _on_setup(self, channel: Channel) -> None:
        await channel.declare(CANCELS)

    async def _step(self) -> float:
        try:
            if self._leads():
                await self._round()
            self.problem = None
        except Unavailable as error:
            if self.problem is None:
                log.warning("jobs are not swept", extra={"problem": error.message})
            self.problem = error.message
        return self._interval_s

    async def _round(self) -> None:
        await self._expire()
        await self._revive()
        await self._republish()
        while await self._retire() == BATCH:
            await asyncio.sleep(0)
        if self._rounds % MEMORY_EVERY == 0:
            await self._make_room()
        self._rounds += 1

    async def _expire(self) -> None:
        expired = await self._jobs.expire(_now_ms(), BATCH)
        EXPIRED.inc(len(expired))
        if expired:
            await self._cancel(expired)

    async def _cancel(self, jobs: Sequence[Job]) -> None:
        """Tell the workers to cancel jobs, so that they do not compute unused results. Best effort."""
        body = envelope.pack(envelope.CANCELS, [job.id for job in jobs])
        with contextlib.suppress(Unavailable):
            if self.out.channel is not None:
                await self.out.channel.publish(body, exchange=CANCELS.name, routing_key="")

    async def _revive(self) -> None:
        """Queue jobs again if the broker has lost their messages. Their records still hold the requests."""
        for deployment, left in self._lost().items():
            before = _now_ms() - LOST_AFTER_MS
            revived = await self._jobs.revive(deployment, before, orphans=not left)
            log.error(
                "messages of jobs were lost; the jobs are queued again",
                extra={"deployment": deployment, "revived": revived},
            )

    async def _republish(self) -> None:
        channel = self.out.channel
        if channel is None:
            return  # not connected: a later round publishes the jobs
        stale = await self._jobs.stale(_now_ms(), BATCH)
        published = await asyncio.gather(*(self._publish(channel, job) for job in stale))
        confirmed = [job.id for job, done in zip(stale, published, strict=True) if done]
        if confirmed:
            await self._jobs.queued(confirmed)

    async def _publish(self, channel: Channel, job: Job) -> bool:
        """Publish a job's message again. Return True if the broker has confirmed it."""
        frame = await self._jobs.claim_republish(job.id, job.attempt, job.state)
        if frame is None:
            await self._keep_if_failed(job)
            return False  # the job's state has changed, or another router publishes it
        queue = jobs_queue(job.deployment, job.level)
        try:
            if queue.name not in self._declared:
                await channel.declare(queue)
                self._declared.add(queue.name)
            body = envelope.pack(envelope.REQUESTS, [frame])
            await channel.publish(body, routing_key=queue.name, mandatory=True, persistent=True)
        except Unroutable:
            self._declared.discard(queue.name)
            return False
        except Unavailable as error:
            log.info(
                "a job cannot be published again yet; trying again",
                extra={"job": job.id.hex(), "problem": str(error)},
            )
            return False
        REPUBLISHED.labels(job.state).inc()
        log.info("a job was published again", extra={"job": job.id.hex(), "state": job.state})
        return True

    async def _keep_if_failed(self, before: Job) -> None:
        """Store a job as a dead letter if it has just failed and will not be retried."""
        job = await self._jobs.get(before.id)
        if self._letters is None or job is None or job.state != "failed" or job.attempt != before.attempt:
            return
        cause = DEAD_LETTER_CAUSES.get((job.error or {}).get("reason", ""))
        frame = await self._jobs.request(job.id) if cause else None
        if cause and frame is not None:
            request = envelope.read_request(frame)
            queue = jobs_queue(job.deployment, job.level).name
            letter = DeadLetter(time.time(), cause, queue, job.id.hex(), job.attempt, len(frame), "")
            letter = replace(letter, trace=telemetry.shown_id(request.trace))
            await self._letters.add(replace(letter, tenant=job.principal), request)

    async def _retire(self) -> int:
        keep = self._retention
        removed = await self._jobs.retire(_now_ms(), int(keep.keep_s * 1e3), keep.count, BATCH)
        RETIRED.inc(removed)
        return removed

    async def _make_room(self) -> None:
        """Remove the oldest finished jobs while the store exceeds its memory limit."""
        size = StoreSize(*await self._jobs.size())
        STORE_BYTES.set(size.used_bytes)
        surplus = self._retention.surplus(size)
        if surplus and not self._full:
            log.warning(
                "the store of jobs is full: the oldest results are removed early",
                extra={"used_bytes": size.used_bytes, "limit_bytes": self._retention.bytes},
            )
        self._full = surplus > 0
        at_least_ms = int(self._retention.at_least_s * 1e3)
        while surplus > 0:
            batch = min(surplus, BATCH)
            removed = await self._jobs.retire(_now_ms(), at_least_ms, size.records, batch)
            RETIRED.inc(removed)
            surplus -= removed
            if removed < batch:
                break  # the other results are too young to be removed
            await asyncio.sleep(0)


def _now_ms() -> int:
    return int(time.time() * 1e3)

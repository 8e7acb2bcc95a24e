"""The AMQP door for jobs: messages of three levels in, on a connection of their own, each settled once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from typing import Any

from services.worker.adapters.metrics import JOBS, REDELIVERED
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.application.batch_scheduler import BatchScheduler
from services.worker.application.job_scheduler import JobScheduler
from services.worker.domain.ack_tracker import AckTracker
from services.worker.domain.attempts import EXHAUSTED, NOT_RETRIED, UNDECODABLE
from services.worker.domain.concurrency import job_calls
from services.worker.domain.job_backlog import QueuedJob
from services.worker.domain.prefetch import job_prefetch, worth_changing
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import jobs_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import LEVELS, Level

log = telemetry.logger(__name__)

RETUNE_S = 1.0
# What could not begin for so long is given back: another replica may be free.
PATIENCE_S = 1.0
# Acks of so long travel together: many jobs end within it, and nobody waits for an ack.
ACK_DELAY_S = 0.002
TOKEN_SIZE = 8


class JobConsumer:
    """Consumes the three job queues of a Deployment for as long as it is open."""

    def __init__(self, amqp_url: str, deployment: str, publisher: ReplyPublisher, jobs: JobScheduler) -> None:
        self._queues = {level: jobs_queue(deployment, level) for level in LEVELS}
        self._publisher = publisher
        self._jobs = jobs
        self._scheduler: BatchScheduler | None = None
        self._acks = AckTracker()
        self._channel: Channel | None = None
        self._consumers: list[str] = []
        self._prefetch = 0
        self._open = False
        self._changing = asyncio.Lock()
        self._retune_task: asyncio.Task[None] | None = None
        self._over: list[int] = []
        self.connection = Connection(amqp_url, "worker-jobs", self._on_setup, self._on_down)

    @property
    def unsettled(self) -> int:
        """Messages not settled yet."""
        return len(self._acks) if self._channel is not None else 0

    def start(self, scheduler: BatchScheduler) -> None:
        """Connect; nothing is taken before :meth:`open`. ``scheduler`` says how much is wanted."""
        self._scheduler = scheduler
        self.connection.start()
        self._retune_task = asyncio.create_task(self._retune(), name="retune jobs")

    async def stop(self) -> None:
        """Disconnect; what is unsettled goes back to its queue."""
        await tasks.end(self._retune_task)
        if self._channel is not None:
            self._ack_all(self._channel)
        await self.connection.stop()

    async def open(self) -> None:
        """Take jobs from now on."""
        self._open = True
        await self._change()

    async def close(self) -> None:
        """Take no more, and give back what has not begun; the rest is worked off and settled."""
        self._open = False
        await self._change()
        self._give_back(time.monotonic())
        self.give_back(self._jobs.give_back_suspects())

    def is_open(self, job: QueuedJob) -> bool:
        """Whether its message can still be acked."""
        return job.channel is self._channel

    async def bury(self, job: QueuedJob) -> None:
        """Hand a job to the router that may not be tried again; returns when the broker has it."""
        safe = bool(job.request.flags & envelope.RETRY_SAFE)
        body = envelope.pack(envelope.REQUESTS, [job.request.raw])
        cause = EXHAUSTED if safe else NOT_RETRIED
        await self._publisher.give_up(body, cause, None, queue=self._queues[job.level].name)

    def settle(self, group: Sequence[QueuedJob]) -> None:
        """Ack the messages of these."""
        channel = self._channel
        if channel is not None:
            self._ack(channel, [h.tag for h in group if h.channel is channel and h.leased_at is None])

    def give_back(self, group: Sequence[QueuedJob]) -> None:
        """Have the messages of these delivered again, here or elsewhere; what is leased has none."""
        channel = self._channel
        tags = [job.tag for job in group if job.channel is channel and job.leased_at is None]
        if tags and channel is not None:
            self._nack(channel, tags)

    def _ack(self, channel: Channel, tags: list[int]) -> None:
        if tags and channel is self._channel:
            if not self._over:
                asyncio.get_running_loop().call_later(ACK_DELAY_S, self._ack_all, channel)
            self._over += tags

    def _ack_all(self, channel: Channel) -> None:
        if channel is self._channel:
            tags, self._over = self._over, []
            with contextlib.suppress(Unavailable):  # the channel is over: all of it is delivered again
                for tag, multiple in self._acks.settle(tags):
                    channel.ack(tag, multiple=multiple)

    def _give_back(self, before: float) -> None:
        self.give_back(self._jobs.give_back(before))

    def _nack(self, channel: Channel, tags: list[int]) -> None:
        with contextlib.suppress(Unavailable):  # as above
            for tag in tags:
                if channel is self._channel and self._acks.given_back(tag):
                    channel.nack(tag)

    # --- session and consumers -------------------------------------------------------------------------

    async def _on_setup(self, channel: Channel) -> None:
        for queue in self._queues.values():
            await channel.declare(queue)
        self._channel, self._acks, self._over, self._consumers = channel, AckTracker(), [], []
        async with self._changing:
            if self._open and not self._consumers:
                await self._consume(channel)

    def _on_down(self) -> None:
        self._channel, self._consumers = None, []
        self._jobs.forget()

    async def _change(self) -> None:
        """Consumers as they are wanted now; a new prefetch needs new ones."""
        async with self._changing:
            channel, consumers = self._channel, self._consumers
            if channel is None:
                return
            with contextlib.suppress(Unavailable):
                self._consumers = []
                for consumer in consumers:
                    await channel.cancel(consumer)
                if self._open and channel is self._channel:
                    await self._consume(channel)

    async def _consume(self, channel: Channel) -> None:
        self._prefetch = self._wanted()
        for level, queue in self._queues.items():
            consumer = await channel.consume(queue, partial(self._on_job, level), prefetch=self._prefetch)
            self._consumers.append(consumer)

    def _wanted(self) -> int:
        assert self._scheduler is not None
        return job_prefetch(
            call_ms=self._scheduler.stats.call_ms.value,
            batch_mean=self._scheduler.stats.batch.value,
            calls=job_calls(self._scheduler.in_flight),
            batch=self._scheduler.batch,
        )

    async def _retune(self) -> None:
        while True:
            await asyncio.sleep(RETUNE_S)
            self._give_back(time.monotonic() - PATIENCE_S)
            if self._consumers and worth_changing(self._prefetch, self._wanted()):
                await self._change()

    # --- messages --------------------------------------------------------------------------------------

    def _on_job(self, level: Level, delivery: Delivery) -> Coroutine[Any, Any, None] | None:
        channel = self._channel
        if channel is None:
            return None  # it came while the channel ends: unsettled, it is delivered again
        self._acks.delivered(delivery.tag)
        try:
            (frame,) = envelope.unpack(envelope.REQUESTS, delivery.body)
            request = envelope.read_request(frame)
        except ValueError as error:  # not an envelope, or not of one request
            log.error("undecodable job", extra={"problem": str(error)})
            return self._on_undecodable(channel, delivery)
        if delivery.redelivered:
            REDELIVERED.inc()
        now = time.monotonic()
        known = self._jobs.by_id.get(request.id)
        if known is None:
            token = os.urandom(TOKEN_SIZE)
            self._jobs.add(
                QueuedJob(request, level, channel, delivery.tag, delivery.redelivered, token, now, now)
            )
        elif known.leased_at is None and not self.is_open(known):
            # Its channel had ended under it, and its message came back to us.
            known.channel, known.tag, known.delivered = channel, delivery.tag, now
        else:
            JOBS.labels("dropped").inc()
            self._ack(channel, [delivery.tag])
        return None

    async def _on_undecodable(self, channel: Channel, delivery: Delivery) -> None:
        await self._publisher.give_up(
            delivery.body, UNDECODABLE, delivery.reply_to, queue=delivery.routing_key
        )
        self._ack(channel, [delivery.tag])

"""Consume a Deployment's jobs over AMQP.

Jobs have a connection of their own; requests use another connection. Each priority level has a queue.
"""

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
from services.worker.application.job_scheduler import JobScheduler
from services.worker.application.serving import Scheduler
from services.worker.domain.ack_tracker import AckTracker
from services.worker.domain.concurrency import job_calls
from services.worker.domain.job_backlog import QueuedJob
from services.worker.domain.prefetch import job_prefetch, worth_changing
from services.worker.domain.retry_after_loss import EXHAUSTED, NOT_RETRIED, UNDECODABLE
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import jobs_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.jobs import LEVELS, Level

log = telemetry.logger(__name__)

RETUNE_S = 1.0
# A job that has waited in this worker for this many seconds is requeued, so that an idle replica can take it.
MAX_WAIT_S = 1.0
# Seconds by which an ack is delayed, so that many acks are sent in one write. No caller waits for an ack.
ACK_DELAY_S = 0.002
TOKEN_SIZE = 8


class JobConsumer:
    """Consumer of the three job queues of a Deployment, from :meth:`open` until :meth:`close`.

    It settles each message exactly once.
    """

    def __init__(self, amqp_url: str, deployment: str, publisher: ReplyPublisher, jobs: JobScheduler) -> None:
        self._queues = {level: jobs_queue(deployment, level) for level in LEVELS}
        self._publisher = publisher
        self._jobs = jobs
        self._scheduler: Scheduler | None = None
        self._acks = AckTracker()
        self._channel: Channel | None = None
        self._consumers: list[str] = []
        self._prefetch = 0
        self._open = False
        self._changing = asyncio.Lock()
        self._retune_task: asyncio.Task[None] | None = None
        self._to_ack: list[int] = []
        self.connection = Connection(amqp_url, "worker-jobs", self._on_setup, self._on_down, fast=True)

    @property
    def unsettled(self) -> int:
        """Return how many messages are not settled yet."""
        return len(self._acks) if self._channel is not None else 0

    def start(self, scheduler: Scheduler) -> None:
        """Connect. No job is consumed before :meth:`open`.

        ``scheduler``: the prefetch depends on its limits, and on the duration and the batch sizes of its
        calls.
        """
        self._scheduler = scheduler
        self.connection.start()
        self._retune_task = asyncio.create_task(self._retune(), name="retune jobs")

    async def stop(self) -> None:
        """Disconnect; unsettled messages go back to their queues."""
        await tasks.end(self._retune_task)
        if self._channel is not None:
            self._flush_acks(self._channel)
        await self.connection.stop()

    async def open(self) -> None:
        """Consume jobs from now on."""
        self._open = True
        await self._update_consumers()

    async def close(self) -> None:
        """Stop consuming, and requeue the jobs that have not started. Started jobs still run to their end."""
        self._open = False
        await self._update_consumers()
        self._requeue_waiting(time.monotonic())
        self.nack(self._jobs.release_suspects())

    def can_ack(self, job: QueuedJob) -> bool:
        """Return True if the job's message can be acked: the channel that delivered it is still open."""
        return job.channel is self._channel

    async def dead_letter(self, job: QueuedJob) -> None:
        """Publish a job to the router, which keeps it as a dead letter.

        The job must not run again: its attempts are used up, or it is not safe to retry. Return after the
        publisher confirm.
        """
        safe = bool(job.request.flags & envelope.RETRY_SAFE)
        body = envelope.pack(envelope.REQUESTS, [job.request.raw])
        cause = EXHAUSTED if safe else NOT_RETRIED
        await self._publisher.publish_exception(body, cause, None, queue=self._queues[job.level].name)

    def ack(self, group: Sequence[QueuedJob]) -> None:
        """Ack the messages of jobs. Leased jobs are skipped, because their messages are already acked."""
        channel = self._channel
        if channel is not None:
            self._ack(channel, [job.tag for job in group if job.channel is channel and job.leased_at is None])

    def nack(self, group: Sequence[QueuedJob]) -> None:
        """Requeue the messages of jobs, so that any worker can get them.

        Leased jobs are skipped, because their messages are already acked.
        """
        channel = self._channel
        if channel is None:
            return
        tags = [job.tag for job in group if job.channel is channel and job.leased_at is None]
        with contextlib.suppress(Unavailable):  # if the channel ended, the broker redelivers its messages
            for tag in tags:
                if channel is self._channel and self._acks.nacked(tag):
                    channel.nack(tag)

    def _ack(self, channel: Channel, tags: list[int]) -> None:
        if tags and channel is self._channel:
            if not self._to_ack:
                asyncio.get_running_loop().call_later(ACK_DELAY_S, self._flush_acks, channel)
            self._to_ack += tags

    def _flush_acks(self, channel: Channel) -> None:
        if channel is self._channel:
            tags, self._to_ack = self._to_ack, []
            with contextlib.suppress(Unavailable):  # if the channel ended, the broker redelivers its messages
                for tag, multiple in self._acks.settle(tags):
                    channel.ack(tag, multiple=multiple)

    def _requeue_waiting(self, received_before: float) -> None:
        self.nack(self._jobs.release_waiting(received_before))

    # --- channel and consumers -------------------------------------------------------------------------

    async def _on_setup(self, channel: Channel) -> None:
        for queue in self._queues.values():
            await channel.declare(queue)
        self._channel, self._acks, self._to_ack, self._consumers = channel, AckTracker(), [], []
        async with self._changing:
            if self._open and not self._consumers:
                await self._consume(channel)

    def _on_down(self) -> None:
        self._channel, self._consumers = None, []
        self._jobs.discard_waiting()

    async def _update_consumers(self) -> None:
        """Replace the AMQP consumers by new ones with the desired prefetch.

        If this object is closed, cancel the present consumers and start no new ones.
        """
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
        self._prefetch = self._desired_prefetch()
        for level, queue in self._queues.items():
            consumer = await channel.consume(queue, partial(self._on_job, level), prefetch=self._prefetch)
            self._consumers.append(consumer)

    def _desired_prefetch(self) -> int:
        assert self._scheduler is not None
        return job_prefetch(
            call_ms=self._scheduler.stats.call_ms.value,
            batch_mean=self._scheduler.stats.batch.value,
            calls=job_calls(self._scheduler.max_calls),
            max_batch=self._scheduler.max_batch,
        )

    async def _retune(self) -> None:
        while True:
            await asyncio.sleep(RETUNE_S)
            self._requeue_waiting(time.monotonic() - MAX_WAIT_S)
            if self._consumers and worth_changing(self._prefetch, self._desired_prefetch()):
                await self._update_consumers()

    # --- messages --------------------------------------------------------------------------------------

    def _on_job(self, level: Level, delivery: Delivery) -> Coroutine[Any, Any, None] | None:
        channel = self._channel
        if channel is None:
            return None  # the channel is ending; the broker delivers the unsettled message again
        self._acks.delivered(delivery.tag)
        try:
            (frame,) = envelope.unpack(envelope.REQUESTS, delivery.body)
            request = envelope.read_request(frame)
        except ValueError as error:  # not an envelope with exactly one request
            log.error("undecodable job", extra={"problem": str(error)})
            return self._reject(channel, delivery)
        if delivery.redelivered:
            REDELIVERED.inc()
        now = time.monotonic()
        known = self._jobs.by_id.get(request.id)
        if known is None:
            token, tag = os.urandom(TOKEN_SIZE), delivery.tag
            self._jobs.add(QueuedJob(request, level, channel, tag, delivery.redelivered, token, now, now))
        elif known.leased_at is None and not self.can_ack(known):
            # The channel ended while the job ran, and the new channel delivered its message again. From now
            # on, the job's ack uses the new channel and tag.
            known.channel, known.tag, known.delivered = channel, delivery.tag, now
        else:
            JOBS.labels("dropped").inc()
            self._ack(channel, [delivery.tag])
        return None

    async def _reject(self, channel: Channel, delivery: Delivery) -> None:
        queue = delivery.routing_key
        await self._publisher.publish_exception(delivery.body, UNDECODABLE, delivery.reply_to, queue=queue)
        self._ack(channel, [delivery.tag])

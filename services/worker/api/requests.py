"""Consume a Deployment's requests over AMQP. Settle each delivery exactly once."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from services.worker.adapters.claim_fetcher import ClaimFetcher
from services.worker.adapters.metrics import REDELIVERED
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.api.suspects import SuspectConsumer
from services.worker.application.batch_scheduler import BatchScheduler
from services.worker.domain.ack_tracker import AckTracker
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from services.worker.domain.call_duration import Mean
from services.worker.domain.prefetch import consumer_prefetch, prefetch, without_margin, worth_changing
from services.worker.domain.retry_after_loss import UNDECODABLE
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import CANCELS, WORKERS, Queue, cancels_queue, suspects_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply, Request
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

RETUNE_S = 1.0
BLOCKED_POLL_S = 1.0
# The prefetch of the replica's own queue, which has the requests of its sequences. Further requests wait in
# this queue.
SEQUENCE_PREFETCH = 512


class RequestConsumer:
    """Consumer of a Deployment's requests, from :meth:`open` until :meth:`close`.

    It also acks their deliveries. ``sequences`` is the replica's own queue, for the requests of its
    sequences. This queue is consumed even after :meth:`close`, because no other replica can run these
    requests.
    """

    def __init__(
        self,
        amqp_url: str,
        queue: Queue,
        replica: str,
        publisher: ReplyPublisher,
        *,
        claims: Claims,
        fetch_bytes: int,
        sequences: Queue | None = None,
    ) -> None:
        self._queue = queue
        self._sequences_queue = sequences
        self._cancels = cancels_queue(replica, os.urandom(4).hex())
        self._publisher = publisher
        self._acks = AckTracker()
        self._channel: Channel | None = None
        self._consumer: str | None = None
        self._prefetch = 0
        self._changing = asyncio.Lock()
        self._tasks = TaskSet()
        self._frames = Mean(weight=0.1)
        self._retune_task: asyncio.Task[None] | None = None
        self._open = False
        self._scheduler: BatchScheduler | None = None
        self._claim_fetcher = ClaimFetcher(claims, publisher, fetch_bytes, self._on_fetched, self.settle)
        self._suspects = SuspectConsumer(queue, publisher, self)
        # No confirms are needed. A reply is sent before the ack of its request. So if the broker does not get
        # the reply, it does not get the ack either, and delivers the request again.
        self.connection = Connection(
            amqp_url, "worker-in", self._on_setup, self._on_down, confirms=False, fast=True
        )

    def deliver_to(self, scheduler: BatchScheduler) -> None:
        """Pass requests to this scheduler."""
        self._scheduler = scheduler
        if scheduler.sequences is not None:
            scheduler.sequences.fetch = self._claim_fetcher.fetch

    def start(self) -> None:
        """Connect; no request is consumed before :meth:`open`."""
        self.connection.start()
        self._suspects.start()
        self._retune_task = asyncio.create_task(self._retune(), name="retune")

    async def stop(self) -> None:
        """Disconnect; unsettled requests go back to the queue."""
        await tasks.end(self._retune_task)
        await self._suspects.stop()
        if self._sequences_queue is not None and self._channel is not None:
            # If the deletion fails, the gateways still find out that this replica has ended, because its
            # queue has no consumer.
            with contextlib.suppress(Unavailable, TimeoutError):
                async with asyncio.timeout(BLOCKED_POLL_S):
                    await self._channel.delete(self._sequences_queue)
        await self._claim_fetcher.stop()
        await self.connection.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def open(self) -> None:
        """Consume requests from now on."""
        self._open = True
        await self._update_consumer()

    async def close(self) -> None:
        """Stop consuming. Requests that were received still run and are settled."""
        self._open = False
        await self._update_consumer()

    def requeue_waiting(self) -> None:
        """Publish the waiting requests to the queue again, if other replicas consume it."""
        self._tasks.start(self._requeue_waiting(), "requeue")

    async def _requeue_waiting(self) -> None:
        channel, scheduler = self._channel, self._scheduler
        with contextlib.suppress(Unavailable):  # if the channel ended, the broker redelivers its messages
            if channel is None or scheduler is None or not await channel.consumers(self._queue):
                return
            # The model may have been loaded again during the wait for the broker. Then the requests run here.
            waiting = [] if scheduler.serving else scheduler.take_waiting()
            for item in waiting:
                await self._publisher.requeue(item.request, item.delivery.reply_to)
                self.settle([item])
            if waiting:
                log.info("requests were requeued", extra={"requests": len(waiting)})

    @property
    def accepting(self) -> tuple[Channel, BatchScheduler] | None:
        """Return the channel and the scheduler to run suspects with, or None while no request may start."""
        channel, scheduler = self._channel, self._scheduler
        return (channel, scheduler) if self._open and channel is not None and scheduler is not None else None

    @property
    def unsettled(self) -> int:
        """Return how many deliveries are not acked yet."""
        return len(self._acks)

    def reply(self, group: list[QueuedRequest], by_gateway: Mapping[str, Sequence[Buffer | Reply]]) -> bool:
        """Send small replies and settle their requests, all in one write. Return False if nothing was sent.

        No confirm is needed. If the connection breaks before the broker has read a reply, the broker has not
        read the ack of its request either. So it delivers the request again.
        """
        channel = self._channel
        if channel is None or any(
            isinstance(reply, Reply) or len(reply) > envelope.LARGE
            for replies in by_gateway.values()
            for reply in replies
        ):
            return False
        with contextlib.suppress(Unavailable), channel.cork():
            for reply_to, replies in by_gateway.items():
                for start, end in envelope.runs([len(frame) for frame in replies]):
                    channel.send(
                        envelope.pack(envelope.REPLIES, replies[start:end]),  # type: ignore[arg-type]
                        exchange=WORKERS.name,
                        routing_key=reply_to,
                    )
            self.settle(group)
            return True
        return False  # the channel has ended or an alarm blocks it: nothing was written

    def settle(self, group: list[QueuedRequest]) -> None:
        """Settle requests, and ack each delivery whose requests are all settled."""
        tags = []
        self._claim_fetcher.release(group)
        for item in group:
            if item.settled:  # the request was settled before its call was cancelled
                continue
            item.settled = True
            delivery = item.delivery
            delivery.open -= 1
            if delivery.open == 0 and delivery.channel is self._channel:
                tags.append(delivery.tag)
        if tags and self._channel is not None:
            self._ack(self._channel, tags)

    def _ack(self, channel: Channel, tags: list[int]) -> None:
        if channel is not self._channel:
            return  # the broker redelivers the requests; these tags belong to the old channel
        with contextlib.suppress(Unavailable):  # if the channel ended, the broker redelivers its messages
            for tag, multiple in self._acks.settle(tags):
                channel.ack(tag, multiple=multiple)

    # --- channel and consumer --------------------------------------------------------------------------

    async def _on_setup(self, channel: Channel) -> None:
        await channel.declare(self._queue, bind=False)
        await channel.declare(suspects_queue(self._queue), bind=False)
        # Only the owner of an exchange declares it: the right to declare it includes the right to delete it.
        await channel.find(WORKERS)
        await channel.find(CANCELS)
        await channel.declare(self._cancels)
        await channel.bind(self._cancels, CANCELS)
        await channel.consume(self._cancels, self._on_cancels, prefetch=100, no_ack=True)
        self._channel, self._acks, self._consumer = channel, AckTracker(), None
        if self._sequences_queue is not None:
            await channel.declare(self._sequences_queue)
            await channel.consume(self._sequences_queue, self._on_sequences, prefetch=SEQUENCE_PREFETCH)
        async with self._changing:
            if self._open and self._consumer is None:
                await self._consume(channel)

    def _on_down(self) -> None:
        self._channel = self._consumer = None
        self._claim_fetcher.clear()
        if self._scheduler is not None:
            self._scheduler.discard_waiting()

    async def _update_consumer(self) -> None:
        """Replace the AMQP consumer by one with the desired prefetch.

        If this object is closed, only cancel the present consumer. A broker that is short of memory does not
        read this connection. Then this method returns early, and the consumer is replaced or cancelled when
        the broker reads again.
        """
        changing = self._tasks.start(self._replace_consumer())
        while not (await asyncio.wait({changing}, timeout=BLOCKED_POLL_S))[0]:
            if self._channel is not None and self._channel.blocked:
                return

    async def _replace_consumer(self) -> None:
        async with self._changing:
            channel, consumer = self._channel, self._consumer
            if channel is None:
                return
            with contextlib.suppress(Unavailable):  # if the channel has ended, its consumer has too
                if consumer is not None:
                    self._consumer = None
                    await channel.cancel(consumer)
                if self._open and channel is self._channel:
                    await self._consume(channel)

    async def _consume(self, channel: Channel) -> None:
        self._prefetch = self._with_margin(self._desired_prefetch())
        self._consumer = await channel.consume(self._queue, self._on_requests, prefetch=self._prefetch)

    @property
    def holds(self) -> int:
        """Return how many requests the gateways should publish to keep this worker busy; 0 if unknown."""
        scheduler = self._scheduler
        if scheduler is None or not self._prefetch:
            return 0
        if scheduler.decoupled:
            return scheduler.max_calls
        return math.ceil(without_margin(self._prefetch) * max(self._frames.value or 1.0, 1.0))

    def _with_margin(self, messages: int) -> int:
        # The margin is an addition to the prefetch. It is for requests of callers below their fair share,
        # because gateways publish these requests immediately. Streams have no margin, because a stream that
        # waits here cannot move to another replica.
        decoupled = self._scheduler is not None and self._scheduler.decoupled
        return messages if decoupled else consumer_prefetch(messages)

    def _desired_prefetch(self) -> int:
        assert self._scheduler is not None
        scheduler = self._scheduler
        return prefetch(
            call_ms=scheduler.stats.call_ms.value,
            batch_mean=scheduler.stats.batch.value,
            frames_per_message=self._frames.value or 1.0,
            max_calls=scheduler.max_calls,
            awaited_batch=scheduler.awaited_batch,
            max_batch=scheduler.max_batch,
        )

    async def _retune(self) -> None:
        while True:
            await asyncio.sleep(RETUNE_S)
            if self._consumer is not None and worth_changing(
                self._prefetch, self._with_margin(self._desired_prefetch())
            ):
                await self._update_consumer()

    # --- deliveries ------------------------------------------------------------------------------------

    def _on_requests(self, delivery: Delivery) -> Coroutine[Any, Any, None] | None:
        channel = self._channel
        if channel is None or self._scheduler is None:
            return None  # the channel is ending; the broker delivers the unsettled message again
        self._acks.delivered(delivery.tag)
        try:
            requests = [envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, delivery.body)]
        except envelope.Undecodable as error:
            log.error("undecodable request envelope", extra={"problem": str(error)})
            return self._reject(channel, delivery)
        if delivery.redelivered:
            REDELIVERED.inc(len(requests))
            return self._retry(channel, delivery, requests)
        self._frames.add(len(requests))
        unacked = UnackedDelivery(channel, delivery.tag, delivery.reply_to or "", len(requests))
        received = time.monotonic()
        scheduler = self._scheduler
        for request in requests:
            item = QueuedRequest(request, unacked, received)
            if request.flags & envelope.CLAIM:
                self._claim_fetcher.start(item)
            else:
                scheduler.add(item)
        return None

    def _on_sequences(self, delivery: Delivery) -> Coroutine[Any, Any, None] | None:
        channel, scheduler = self._channel, self._scheduler
        if channel is None or scheduler is None or scheduler.sequences is None:
            return None  # the channel is ending; the broker delivers the unsettled message again
        self._acks.delivered(delivery.tag)
        try:
            requests = [envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, delivery.body)]
        except envelope.Undecodable as error:
            log.error("an envelope of a sequence cannot be decoded", extra={"problem": str(error)})
            return self._reject(channel, delivery)
        unacked = UnackedDelivery(channel, delivery.tag, delivery.reply_to or "", len(requests))
        for request in requests:
            item = QueuedRequest(request, unacked, time.monotonic())
            scheduler.sequences.add(item, again=delivery.redelivered)
        return None

    async def _reject(self, channel: Channel, delivery: Delivery) -> None:
        await self._publisher.publish_exception(delivery.body, UNDECODABLE, delivery.reply_to)
        self._ack(channel, [delivery.tag])

    async def _retry(self, channel: Channel, delivery: Delivery, requests: list[Request]) -> None:
        for request in requests:
            # It is not certain that the request ran alone. The dead worker may not have started it, or may
            # have run other requests with it.
            await self._publisher.retry_or_give_up(request, delivery.reply_to or "", alone=False)
        self._ack(channel, [delivery.tag])

    def _on_fetched(self, item: QueuedRequest) -> None:
        if self._scheduler is not None and item.delivery.channel is self._channel:
            self._scheduler.add(item)

    async def _on_cancels(self, delivery: Delivery) -> None:
        with contextlib.suppress(envelope.Undecodable):
            ids = [bytes(frame) for frame in envelope.unpack(envelope.CANCELS, delivery.body)]
            if self._scheduler is not None:
                self._scheduler.cancel(ids)

    # --- suspects --------------------------------------------------------------------------------------

    async def consume_single(self, channel: Channel, queue: Queue, take: Callable[[Delivery], None]) -> str:
        """Consume a queue one message at a time; return the consumer's tag."""
        async with self._changing:  # two consumers that start together could get each other's prefetch
            return await channel.consume(queue, take, prefetch=1)

    async def read_suspect(self, channel: Channel, delivery: Delivery) -> QueuedRequest | None:
        """Return the request of a suspect's delivery, with its tensors; None if it must not run."""
        if channel is not self._channel:
            return None  # the channel has ended, so the broker redelivers the suspect
        self._acks.delivered(delivery.tag)
        try:
            (frame,) = envelope.unpack(envelope.REQUESTS, delivery.body)
            request = envelope.read_request(frame)
        except ValueError as error:  # not an envelope with exactly one request
            log.error("undecodable suspect", extra={"problem": str(error)})
            await self._reject(channel, delivery)
            return None
        if delivery.redelivered:
            REDELIVERED.inc()
            await self._publisher.retry_or_give_up(request, delivery.reply_to or "", alone=True)
            self._ack(channel, [delivery.tag])
            return None
        unacked = UnackedDelivery(channel, delivery.tag, delivery.reply_to or "", 1)
        item = QueuedRequest(request, unacked, time.monotonic())
        # The limit of fetched bytes does not apply here. The requests that use up this limit wait until the
        # suspect has ended, so the suspect must not wait for them.
        if request.flags & envelope.CLAIM and not await self._claim_fetcher.fetch(item):
            return None
        return item

    async def requeue_suspect(self, item: QueuedRequest) -> None:
        """Publish an unchanged copy of a suspect that has not run."""
        await self._publisher.publish_suspect(item.request, item.request.attempt, item.delivery.reply_to)
        self.settle([item])

"""The AMQP door of the worker: deliveries in, settled exactly once each."""

from __future__ import annotations

import asyncio
import contextlib
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
from services.worker.domain.attempts import UNDECODABLE
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from services.worker.domain.call_duration import Mean
from services.worker.domain.prefetch import prefetch, worth_changing
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import CANCELS, WORKERS, Queue, cancels_queue, suspects_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply, Request

log = telemetry.logger(__name__)

RETUNE_S = 1.0
BLOCKED_POLL_S = 1.0


class RequestConsumer:
    """Consumes a Deployment's queue for as long as it is open."""

    def __init__(
        self,
        amqp_url: str,
        queue: Queue,
        replica: str,
        publisher: ReplyPublisher,
        *,
        claims: Claims,
        fetch_bytes: int,
    ) -> None:
        self._queue = queue
        self._cancels = cancels_queue(replica, os.urandom(4).hex())
        self._publisher = publisher
        self._acks = AckTracker()
        self._channel: Channel | None = None
        self._consumer: str | None = None
        self._prefetch = 0
        self._changing = asyncio.Lock()
        self._changes: set[asyncio.Task[None]] = set()
        self._frames = Mean(weight=0.1)
        self._retune_task: asyncio.Task[None] | None = None
        self._open = False
        self._scheduler: BatchScheduler | None = None
        self._claim_fetcher = ClaimFetcher(claims, publisher, fetch_bytes, self._on_redeemed, self.settle)
        self._suspects = SuspectConsumer(queue, publisher, self)
        # No confirms: a reply goes before the ack of its request, and the broker takes them in this order.
        self.connection = Connection(amqp_url, "worker-in", self._on_setup, self._on_down, confirms=False)

    def feed(self, scheduler: BatchScheduler) -> None:
        """Where the requests go."""
        self._scheduler = scheduler

    def start(self) -> None:
        """Connect; nothing is taken before :meth:`open`."""
        self.connection.start()
        self._suspects.start()
        self._retune_task = asyncio.create_task(self._retune(), name="retune")

    async def stop(self) -> None:
        """Disconnect; what is unsettled goes back to the queue."""
        await tasks.end(self._retune_task)
        await self._suspects.stop()
        await self._claim_fetcher.stop()
        await self.connection.stop()
        await asyncio.gather(*self._changes, return_exceptions=True)

    async def open(self) -> None:
        """Take requests from now on."""
        self._open = True
        await self._change()

    async def close(self) -> None:
        """Take no more; what was delivered is still worked off and settled."""
        self._open = False
        await self._change()

    def hand_back(self) -> None:
        """Let other replicas have the requests that are in no call yet, if there are other replicas."""
        handing = asyncio.create_task(self._handed_back(), name="hand back")
        self._changes.add(handing)
        handing.add_done_callback(self._changes.discard)

    async def _handed_back(self) -> None:
        channel, scheduler = self._channel, self._scheduler
        with contextlib.suppress(Unavailable):  # over: all of it is delivered again
            if channel is None or scheduler is None or not await channel.consumers(self._queue):
                return
            # A model may be there again meanwhile: then they are run here.
            waiting = [] if scheduler.serving else scheduler.take_waiting()
            for item in waiting:
                await self._publisher.put_back(item.request, item.delivery.reply_to)
                self.settle([item])
            if waiting:
                log.info("requests were handed back", extra={"requests": len(waiting)})

    @property
    def isolating(self) -> tuple[Channel, BatchScheduler] | None:
        """Return what suspects are run with; None while no request may be taken."""
        channel, scheduler = self._channel, self._scheduler
        return (channel, scheduler) if self._open and channel is not None and scheduler is not None else None

    @property
    def unsettled(self) -> int:
        """Deliveries not acked yet."""
        return len(self._acks)

    def answer(self, group: list[QueuedRequest], by_gateway: Mapping[str, Sequence[Buffer | Reply]]) -> bool:
        """Send small answers and settle their requests, all in one write; False: it has to go another way.

        No confirm is waited for. What the broker has not read of this connection when it breaks is neither
        answered nor acked, and so delivered again.
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
        return False  # over, or blocked by an alarm: nothing was written

    def settle(self, group: list[QueuedRequest]) -> None:
        """These requests are done; acks the deliveries that have no open request left."""
        tags = []
        self._claim_fetcher.settled(group)
        for item in group:
            if item.settled:  # a call that was cancelled after it had answered some of its requests
                continue
            item.settled = True
            unacked = item.delivery
            unacked.open -= 1
            if unacked.open == 0 and unacked.channel is self._channel:
                tags.append(unacked.tag)
        if tags and self._channel is not None:
            self._ack(self._channel, tags)

    def _ack(self, channel: Channel, tags: list[int]) -> None:
        if channel is not self._channel:
            return  # over: all of it is delivered again, and its tags mean other deliveries by now
        with contextlib.suppress(Unavailable):  # the channel is over: all of it is delivered again
            for tag, multiple in self._acks.settle(tags):
                channel.ack(tag, multiple=multiple)

    async def _on_setup(self, channel: Channel) -> None:
        await channel.declare(self._queue, bind=False)
        await channel.declare(suspects_queue(self._queue), bind=False)
        # Their owners declare them. With the right to declare an exchange comes the right to delete it.
        await channel.find(WORKERS)
        await channel.find(CANCELS)
        await channel.declare(self._cancels)
        await channel.bind(self._cancels, CANCELS)
        await channel.consume(self._cancels, self._on_cancels, prefetch=100, no_ack=True)
        self._channel, self._acks, self._consumer = channel, AckTracker(), None
        async with self._changing:
            if self._open and self._consumer is None:
                await self._consume(channel)

    def _on_down(self) -> None:
        self._channel = self._consumer = None
        self._claim_fetcher.clear()
        if self._scheduler is not None:
            self._scheduler.forget()

    async def _change(self) -> None:
        """A consumer as it is wanted now, or none; a new prefetch needs a new one.

        Returns before that is so when the broker, short of memory, reads nothing from this connection: it
        will be so when the alarm is over.
        """
        changing = asyncio.create_task(self._changed())
        self._changes.add(changing)
        changing.add_done_callback(self._changes.discard)
        while not (await asyncio.wait({changing}, timeout=BLOCKED_POLL_S))[0]:
            if self._channel is not None and self._channel.blocked:
                return

    async def _changed(self) -> None:
        async with self._changing:
            channel, consumer = self._channel, self._consumer
            if channel is None:
                return
            with contextlib.suppress(Unavailable):  # over, and the consumer with it
                if consumer is not None:
                    self._consumer = None
                    await channel.cancel(consumer)
                if self._open and channel is self._channel:
                    await self._consume(channel)

    async def _consume(self, channel: Channel) -> None:
        self._prefetch = self._wanted_prefetch()
        self._consumer = await channel.consume(self._queue, self._on_requests, prefetch=self._prefetch)

    def _wanted_prefetch(self) -> int:
        assert self._scheduler is not None
        scheduler = self._scheduler
        return prefetch(
            call_ms=scheduler.stats.call_ms.value,
            batch_mean=scheduler.stats.batch.value,
            frames_per_message=self._frames.value or 1.0,
            in_flight=scheduler.in_flight,
            company=scheduler.company,
            batch=scheduler.batch,
        )

    async def _retune(self) -> None:
        while True:
            await asyncio.sleep(RETUNE_S)
            if self._consumer is not None and worth_changing(self._prefetch, self._wanted_prefetch()):
                await self._change()

    def _on_requests(self, delivery: Delivery) -> Coroutine[Any, Any, None] | None:
        channel = self._channel
        if channel is None or self._scheduler is None:
            return None  # it came while the channel ends: unsettled, it is delivered again
        self._acks.delivered(delivery.tag)
        try:
            requests = [envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, delivery.body)]
        except envelope.Undecodable as error:
            log.error("undecodable request envelope", extra={"problem": str(error)})
            return self._refuse(channel, delivery)
        if delivery.redelivered:
            REDELIVERED.inc(len(requests))
            return self._try_again(channel, delivery, requests)
        self._frames.add(len(requests))
        unacked = UnackedDelivery(channel, delivery.tag, delivery.reply_to or "", len(requests))
        received = time.monotonic()
        scheduler = self._scheduler
        for request in requests:
            item = QueuedRequest(request, unacked, received)
            if request.flags & envelope.CLAIM:
                self._claim_fetcher.take(item)
            else:
                scheduler.add(item)
        return None

    async def _refuse(self, channel: Channel, delivery: Delivery) -> None:
        await self._publisher.give_up(delivery.body, UNDECODABLE, delivery.reply_to)
        self._ack(channel, [delivery.tag])

    async def _try_again(self, channel: Channel, delivery: Delivery, requests: list[Request]) -> None:
        for request in requests:
            # Whether it was in a call then, and beside what, nobody knows.
            await self._publisher.retry(request, delivery.reply_to or "", alone=False)
        self._ack(channel, [delivery.tag])

    async def consume_alone(self, channel: Channel, queue: Queue, take: Callable[[Delivery], None]) -> str:
        """Consume a queue one message at a time; return the consumer's tag."""
        async with self._changing:  # of two that begin at once, one could get the other's prefetch
            return await channel.consume(queue, take, prefetch=1)

    async def take_alone(self, channel: Channel, delivery: Delivery) -> QueuedRequest | None:
        """Return the request of a suspect's delivery, whole; None: it is settled, and not to be run."""
        if channel is not self._channel:
            return None  # over: it is delivered again
        self._acks.delivered(delivery.tag)
        try:
            (frame,) = envelope.unpack(envelope.REQUESTS, delivery.body)
            request = envelope.read_request(frame)
        except ValueError as error:  # not an envelope, or not of one request
            log.error("undecodable suspect", extra={"problem": str(error)})
            await self._refuse(channel, delivery)
            return None
        if delivery.redelivered:
            REDELIVERED.inc()
            await self._publisher.retry(request, delivery.reply_to or "", alone=True)
            self._ack(channel, [delivery.tag])
            return None
        item = QueuedRequest(
            request, UnackedDelivery(channel, delivery.tag, delivery.reply_to or "", 1), time.monotonic()
        )
        # It waits for no room: what fills that waits for this to end.
        if request.flags & envelope.CLAIM and not await self._claim_fetcher.fetch(item):
            return None
        return item

    async def put_back(self, item: QueuedRequest) -> None:
        """Publish a suspect again that was not run, unchanged."""
        await self._publisher.suspect(item.request, item.request.attempt, item.delivery.reply_to)
        self.settle([item])

    def _on_redeemed(self, item: QueuedRequest) -> None:
        if self._scheduler is not None and item.delivery.channel is self._channel:
            self._scheduler.add(item)

    async def _on_cancels(self, delivery: Delivery) -> None:
        with contextlib.suppress(envelope.Undecodable):
            ids = [bytes(frame) for frame in envelope.unpack(envelope.CANCELS, delivery.body)]
            if self._scheduler is not None:
                self._scheduler.cancel(ids)

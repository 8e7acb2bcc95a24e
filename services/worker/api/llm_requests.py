"""Take requests to a language model from the queues of its bands, at most one for each engine slot.

While the queues are empty, AMQP consumers wait for requests, so that a request starts without delay. If a
request arrives while all engine slots are in use, the worker publishes it again and cancels the consumers.
Then requests wait in the broker. When a slot becomes free, the worker takes one request. The bands take turns
according to their weights (``domain/llm_bands.py``).

A delivery is acked when its answer is complete. So if a worker dies, the broker delivers its requests to
other workers. These workers answer that the requests were lost, and the gateway decides whether to retry
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from functools import partial

from services.worker.adapters.claim_fetcher import ClaimFetcher
from services.worker.adapters.metrics import LLM_RETURNED, LLM_TAKEN, REDELIVERED
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.application.llm_scheduler import LlmScheduler
from services.worker.domain.backlog import QueuedRequest, UnackedDelivery
from services.worker.domain.llm_bands import BandTurns, Source
from services.worker.domain.retry_after_loss import UNDECODABLE
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import (
    CANCELS,
    WORKERS,
    cancels_queue,
    replica_queue,
    requests_queue,
)
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.llm import BAND_WEIGHTS, KEPT_MS, band_of
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

# Seconds between two declarations of a replica's own queues. The broker deletes a queue that nobody has
# declared or used for a few minutes.
RENEW_S = 15.0
RETRY_S = 0.2
# A queue that was found empty is not read again for this many seconds. Each read is a round trip to the
# broker. During that round trip, a free slot of the engine stays unused.
EMPTY_S = 0.1
BLOCKED_POLL_S = 1.0
# The broker adds this header when it moves a message to a shared queue. It moves messages that waited too
# long in a replica's own queue.
MOVED = "x-death"


class LlmRequestConsumer:
    """Consumer of the requests to a language model's Deployment, from :meth:`open` until :meth:`close`.

    It also acks their deliveries.
    """

    def __init__(
        self,
        amqp_url: str,
        deployment: str,
        replica: str,
        publisher: ReplyPublisher,
        *,
        claims: Claims,
        fetch_bytes: int,
    ) -> None:
        self._queues = {Source(band, False): requests_queue(deployment, band) for band in BAND_WEIGHTS}
        self._queues |= {
            Source(band, True): replica_queue(deployment, replica, band) for band in BAND_WEIGHTS
        }
        self._cancels = cancels_queue(replica, os.urandom(4).hex())
        self._publisher = publisher
        self._turns = BandTurns()
        self._channel: Channel | None = None
        self._consumers: list[str] = []
        self._overflowed = False
        self._empty_since: dict[Source, float] = {}
        self._unacked: set[int] = set()
        self._fetches = TaskSet()
        self._open = False
        self._scheduler: LlmScheduler
        self._wake = asyncio.Event()
        self._stepping = asyncio.Lock()
        self._renewed_at = 0.0
        self._tasks = TaskSet()
        self._task: asyncio.Task[None] | None = None
        self._claim_fetcher = ClaimFetcher(claims, publisher, fetch_bytes, lambda _: None, self.settle)
        # No confirms are needed, because nothing is published on this connection.
        self.connection = Connection(
            amqp_url, "worker-llm", self._on_setup, self._on_down, confirms=False, fast=True
        )

    def deliver_to(self, scheduler: LlmScheduler) -> None:
        """Pass requests to this scheduler."""
        self._scheduler = scheduler
        scheduler.on_change = self._wake.set
        scheduler.fetching = lambda: len(self._fetches)

    def start(self) -> None:
        """Connect; no request is taken before :meth:`open`."""
        self.connection.start()
        self._task = asyncio.create_task(self._run(), name="take requests")

    async def stop(self) -> None:
        """Disconnect; unsettled requests go back to their queues."""
        await tasks.end(self._task)
        await self._fetches.end()
        await self.connection.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def open(self) -> None:
        """Take requests from now on."""
        self._open = True
        await self._step_now()

    async def close(self) -> None:
        """Take no more requests. Requests that were taken still run and are settled."""
        self._open = False
        await self._step_now()

    def requeue_waiting(self) -> None:
        """Requeue the waiting requests: publish them to the shared queues again."""
        for item in self._scheduler.take_waiting():
            self._tasks.start(self._return(item), "return")

    @property
    def unsettled(self) -> int:
        """Return how many deliveries are not acked yet."""
        return len(self._unacked)

    @property
    def holds(self) -> int:
        """Return how many requests the gateways should publish for this worker: its slots plus one.

        So a request already waits in the broker when a slot becomes free.
        """
        return self._scheduler.max_calls + 1

    def settle(self, group: list[QueuedRequest]) -> None:
        """Settle requests, and ack each delivery whose requests are all settled."""
        self._claim_fetcher.release(group)
        for item in group:
            if item.settled:
                continue
            item.settled = True
            delivery = item.delivery
            delivery.open -= 1
            if delivery.open == 0:
                self._ack(delivery.channel, delivery.tag)

    def _ack(self, channel: object, tag: int) -> None:
        if self._channel is None or channel is not self._channel:
            return  # the broker redelivers the request; this tag belongs to the old channel
        self._unacked.discard(tag)
        with contextlib.suppress(Unavailable):  # if the channel ended, the broker redelivers its messages
            self._channel.ack(tag)

    # --- channel ---------------------------------------------------------------------------------------

    async def _on_setup(self, channel: Channel) -> None:
        for source, queue in self._queues.items():
            # A worker has no right to bind the shared queues. Their owners bind them.
            await channel.declare(queue, bind=source.own)
        # The right to declare an exchange includes the right to delete it, so only its owner declares it.
        await channel.find(WORKERS)
        await channel.find(CANCELS)
        await channel.declare(self._cancels)
        await channel.bind(self._cancels, CANCELS)
        await channel.consume(self._cancels, self._on_cancels, prefetch=100, no_ack=True)
        self._channel, self._consumers, self._unacked = channel, [], set()
        self._overflowed = False
        self._renewed_at = time.monotonic()
        self._wake.set()

    def _on_down(self) -> None:
        self._channel, self._consumers, self._unacked = None, [], set()
        self._fetches.cancel()
        self._scheduler.requests_wait = True
        self._scheduler.discard_waiting()

    # --- take ------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), RENEW_S)
            self._wake.clear()
            try:
                await self._step()
            except Unavailable as error:
                log.info("requests wait until the broker is available", extra={"problem": error.message})
            except Exception:
                log.exception("no requests could be taken from the queues; the worker tries again")
                await asyncio.sleep(RETRY_S)
                self._wake.set()

    async def _step_now(self) -> None:
        """Run :meth:`_step`, and return when it has ended.

        A broker that is short of memory does not read this connection, so the step cannot end. Then this
        method returns early, and the step continues when the broker reads again.
        """
        step = self._tasks.start(self._step(), "open or close")
        while not (await asyncio.wait({step}, timeout=BLOCKED_POLL_S))[0]:
            if self._channel is not None and self._channel.blocked:
                return

    async def _step(self) -> None:
        """Take requests while an engine slot is free. When the queues are empty, start the consumers.

        If the consumers already run, take no request here. But if a request arrived when no slot was free,
        cancel the consumers first, and then take requests. If this object is closed, only cancel the
        consumers.
        """
        async with self._stepping:
            channel = self._channel
            if channel is None:
                return
            with contextlib.suppress(Unavailable):
                await self._take_turns(channel)

    async def _take_turns(self, channel: Channel) -> None:
        await self._renew(channel)
        if self._consumers and (not self._open or self._overflowed):
            self._scheduler.requests_wait = True
            await self._cancel_consumers(channel)
        if not self._open or self._consumers:
            return
        while self._open and self._free and channel is self._channel:
            if not await self._take_next(channel):
                await self._consume(channel)
                break
        else:
            return
        self._scheduler.requests_wait = False
        self._scheduler.start_jobs()

    async def _take_next(self, channel: Channel) -> bool:
        """Take one request, from the band whose turn it is. Return False if all queues are empty."""
        for source in self._turns.order():
            if time.monotonic() - self._empty_since.get(source, -EMPTY_S) < EMPTY_S:
                continue
            delivery = await channel.get(self._queues[source])
            if delivery is not None:
                self._turns.served(source)
                self._on_message(source, delivery)
                return True
            self._empty_since[source] = time.monotonic()
        return False

    async def _consume(self, channel: Channel) -> None:
        """Consume all queues. Start all consumers at the same time, so that it takes only one round trip."""
        self._overflowed = False
        # Each prefetch is the number of slots. So when one queue alone fills all slots, the broker sends no
        # more messages of this queue.
        prefetch = self._scheduler.max_calls
        self._consumers = await asyncio.gather(
            *(
                channel.consume(queue, partial(self._on_message, source), prefetch=prefetch)
                for source, queue in self._queues.items()
            )
        )

    async def _cancel_consumers(self, channel: Channel) -> None:
        consumers, self._consumers = self._consumers, []
        await asyncio.gather(*map(channel.cancel, consumers))
        self._overflowed = False
        self._empty_since.clear()

    async def _renew(self, channel: Channel) -> None:
        """Keep the broker from deleting the replica's own queues while no consumer uses them."""
        if time.monotonic() - self._renewed_at < RENEW_S or self._consumers:
            return
        self._renewed_at = time.monotonic()
        for source, queue in self._queues.items():
            if source.own:
                await channel.declare(queue)

    @property
    def _free(self) -> int:
        return self._scheduler.free

    # --- messages --------------------------------------------------------------------------------------

    def _on_message(self, source: Source, delivery: Delivery) -> None:
        channel = self._channel
        if channel is None:
            return  # the channel is ending; the broker delivers the unsettled message again
        self._unacked.add(delivery.tag)
        free = self._free
        try:
            requests = [envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, delivery.body)]
        except envelope.Undecodable as error:
            log.error("undecodable request envelope", extra={"problem": str(error)})
            self._tasks.start(self._reject(channel, delivery), "reject")
            return
        unacked = UnackedDelivery(channel, delivery.tag, delivery.reply_to or "", len(requests))
        received = time.monotonic()
        for request in requests:
            if MOVED in delivery.headers:
                # The broker does not mark a moved message as redelivered. But a replica that died may have
                # sent the beginning of an answer to this request. The new attempt number tells the gateway
                # that the next chunks belong to a new answer.
                request = request._replace(attempt=min(request.attempt + 1, 255))
            item = QueuedRequest(request, unacked, received)
            if delivery.redelivered:
                self._on_lost(item)
            elif free <= 0:
                self._overflowed = True
                self._tasks.start(self._return(item), "return")
            else:
                free -= 1
                LLM_TAKEN.labels(source.band, "own" if source.own else "shared").inc()
                self._add(item)
        if self._overflowed:
            self._wake.set()  # `_run` then cancels the consumers

    def _add(self, item: QueuedRequest) -> None:
        if item.request.flags & envelope.CLAIM:
            fetch = self._fetches.start(self._fetch(item), "fetch")
            # Callbacks run in the order in which they were added. So when this one runs, the fetch has
            # already been removed from `_fetches`, and its slot counts as free.
            fetch.add_done_callback(lambda _: self._wake.set())
        else:
            self._scheduler.add(item)

    async def _fetch(self, item: QueuedRequest) -> None:
        """Fetch a large request from the blob store, and run it."""
        if not await self._claim_fetcher.fetch(item) or item.delivery.channel is not self._channel:
            return
        if self._scheduler.serving:
            self._scheduler.add(item)
        else:  # the model was lost during the fetch, so the request cannot run here
            await self._return(item)

    def _on_lost(self, item: QueuedRequest) -> None:
        """Handle a redelivered request. Answer that it was lost, unless it still runs here.

        A request that still runs here was redelivered because only the connection was lost. Then the new
        delivery is acked when the request ends.
        """
        REDELIVERED.inc()
        known = self._scheduler.running(item.request.id)
        if known is None:
            self._tasks.start(self._scheduler.answer_lost(item), "answer lost")
        elif known.delivery.channel is self._channel:
            self.settle([item])  # the gateway published this request twice
        else:
            known.delivery = item.delivery

    async def _return(self, item: QueuedRequest) -> None:
        """Publish a request to its band's shared queue, because it cannot run here now.

        A nack would mark the message as redelivered. Then the next worker would answer that the request was
        lost.
        """
        LLM_RETURNED.inc()
        await self._step()  # cancel the consumers first, or this worker could get the same request again
        queue = self._queues[Source(band_of(item.request.flags), False)]
        await self._publisher.requeue(item.request, item.delivery.reply_to, queue, kept_ms=KEPT_MS)
        self.settle([item])

    async def _reject(self, channel: Channel, delivery: Delivery) -> None:
        await self._publisher.publish_exception(delivery.body, UNDECODABLE, delivery.reply_to)
        self._ack(channel, delivery.tag)

    async def _on_cancels(self, delivery: Delivery) -> None:
        with contextlib.suppress(envelope.Undecodable):
            ids = [bytes(frame) for frame in envelope.unpack(envelope.CANCELS, delivery.body)]
            self._scheduler.cancel(ids)

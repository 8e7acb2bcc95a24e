"""The AMQP door of the worker: deliveries in, settled exactly once each."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from services.worker.api.outbox import Outbox
from services.worker.api.redeeming import Redeeming
from services.worker.domain.attempts import UNDECODABLE
from services.worker.domain.backlog import Item, Parcel
from services.worker.domain.pace import Mean, prefetch, worth_changing
from services.worker.domain.settling import Ack, Settling
from services.worker.metrics import REDELIVERED
from services.worker.work import Work
from tidegate import tasks, telemetry
from tidegate.broker import Delivery, Link, Session
from tidegate.claims import Claims
from tidegate.errors import Unavailable
from tidegate.protocol import envelope
from tidegate.topology import CANCELS, EXCEPTIONS, Queue, cancels_queue

log = telemetry.logger(__name__)

RETUNE_S = 1.0


class Requests:
    """Consumes a Deployment's queue for as long as it is open."""

    def __init__(
        self, amqp_url: str, queue: Queue, replica: str, outbox: Outbox, *, claims: Claims, fetch_bytes: int
    ) -> None:
        self._queue = queue
        self._cancels = cancels_queue(replica, os.urandom(4).hex())
        self._outbox = outbox
        self._settling = Settling()
        self._session: Session | None = None
        self._consumer: str | None = None
        self._prefetch = 0
        self._frames = Mean(weight=0.1)
        self._retune_task: asyncio.Task[None] | None = None
        self._acks: set[asyncio.Task[None]] = set()
        self._open = False
        self._work: Work | None = None
        self._redeeming = Redeeming(claims, outbox, fetch_bytes, self._on_redeemed, self.settle)
        self.link = Link(amqp_url, "worker-in", self._on_setup, self._on_down)

    def feed(self, work: Work) -> None:
        """Where the requests go."""
        self._work = work

    def start(self) -> None:
        """Connect; nothing is taken before :meth:`open`."""
        self.link.start()
        self._retune_task = asyncio.create_task(self._retune(), name="retune")

    async def stop(self) -> None:
        """Disconnect; what is unsettled goes back to the queue."""
        await tasks.end(self._retune_task)
        await self._redeeming.stop()
        await asyncio.gather(*self._acks, return_exceptions=True)
        await self.link.stop()

    async def open(self) -> None:
        """Take requests from now on."""
        self._open = True
        if self._session is not None and self._consumer is None:
            with contextlib.suppress(Unavailable):
                await self._consume(self._session)

    async def close(self) -> None:
        """Take no more; what was delivered is still worked off and settled."""
        self._open = False
        await self._stop_consuming()

    @property
    def unsettled(self) -> int:
        """Deliveries not acked yet."""
        return len(self._settling)

    def settle(self, group: list[Item]) -> None:
        """These requests are done; acks the deliveries that have no open request left."""
        tags = []
        self._redeeming.settled(group)
        for item in group:
            if item.settled:  # a call that was cancelled after it had answered some of its requests
                continue
            item.settled = True
            parcel = item.parcel
            parcel.open -= 1
            if parcel.open == 0 and parcel.session is self._session:
                tags.append(parcel.tag)
        if tags and self._session is not None:
            self._ack(self._session, tags)

    def _ack(self, session: Session, tags: list[int]) -> None:
        if session is not self._session:
            return  # over: all of it is delivered again, and its tags mean other deliveries by now
        acks = self._settling.settle(tags)
        task = asyncio.create_task(self._send_acks(session, acks))
        self._acks.add(task)
        task.add_done_callback(self._acks.discard)

    @staticmethod
    async def _send_acks(session: Session, acks: list[Ack]) -> None:
        with contextlib.suppress(Unavailable):  # the session is over: all of it is delivered again
            for tag, multiple in acks:
                await session.ack(tag, multiple=multiple)

    async def _on_setup(self, session: Session) -> None:
        await session.declare(self._queue)
        await session.declare(EXCEPTIONS)
        await session.declare(CANCELS)
        await session.declare(self._cancels)
        await session.bind(self._cancels, CANCELS)
        await session.consume(self._cancels, self._on_cancels, prefetch=100, no_ack=True)
        self._session, self._settling, self._consumer = session, Settling(), None
        if self._open:
            await self._consume(session)

    def _on_down(self) -> None:
        self._session = self._consumer = None
        self._redeeming.clear()
        if self._work is not None:
            self._work.forget()

    async def _consume(self, session: Session) -> None:
        self._prefetch = self._wanted_prefetch()
        self._consumer = await session.consume(self._queue, self._on_requests, prefetch=self._prefetch)
        if not self._open:  # closed meanwhile
            await self._stop_consuming()

    async def _stop_consuming(self) -> None:
        session, consumer, self._consumer = self._session, self._consumer, None
        if session is not None and consumer is not None:
            with contextlib.suppress(Unavailable):  # the session is over, and the consumer with it
                await session.cancel(consumer)

    def _wanted_prefetch(self) -> int:
        assert self._work is not None
        work = self._work
        return prefetch(
            call_ms=work.stats.call_ms.value,
            batch_mean=work.stats.batch.value,
            frames_per_message=self._frames.value or 1.0,
            in_flight=work.in_flight,
            company=work.company,
            batch=work.batch,
        )

    async def _retune(self) -> None:
        while True:
            await asyncio.sleep(RETUNE_S)
            session = self._session
            if session is None or self._consumer is None:
                continue
            if worth_changing(self._prefetch, self._wanted_prefetch()):
                with contextlib.suppress(Unavailable):
                    await self._stop_consuming()
                    if self._open:
                        await self._consume(session)

    async def _on_requests(self, delivery: Delivery) -> None:
        session = self._session
        assert session is not None
        assert self._work is not None
        self._settling.delivered(delivery.tag)
        try:
            requests = [envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, delivery.body)]
        except envelope.Undecodable as error:
            log.error("undecodable request envelope", extra={"problem": str(error)})
            await self._outbox.give_up(delivery.body, UNDECODABLE, delivery.reply_to)
            self._ack(session, [delivery.tag])
            return
        reply_to = delivery.reply_to or ""
        if delivery.redelivered:
            REDELIVERED.inc(len(requests))
            for request in requests:
                await self._outbox.retry(request, reply_to)
            self._ack(session, [delivery.tag])
            return
        self._frames.add(len(requests))
        parcel = Parcel(session, delivery.tag, reply_to, len(requests))
        received = time.monotonic()
        work = self._work
        for request in requests:
            item = Item(request, parcel, received)
            if request.flags & envelope.CLAIM:
                self._redeeming.take(item)
            else:
                work.add(item)

    def _on_redeemed(self, item: Item) -> None:
        if self._work is not None and item.parcel.session is self._session:
            self._work.add(item)

    async def _on_cancels(self, delivery: Delivery) -> None:
        with contextlib.suppress(envelope.Undecodable):
            ids = [bytes(frame) for frame in envelope.unpack(envelope.CANCELS, delivery.body)]
            if self._work is not None:
                self._work.cancel(ids)

"""Publish requests in envelopes, and pass each reply to the request that waits for it."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from math import inf

from services.gateway.adapters.claim_fetcher import ReplyClaimFetcher
from services.gateway.adapters.event_publisher import EventPublisher
from services.gateway.adapters.pending_requests import (
    DeploymentQueue,
    Framed,
    Lane,
    OnReply,
    PendingRequest,
    frame_of,
    lane_of,
    message_of,
    never_again,
    prepare_again,
    publish_failure,
    replies_in,
    unheard,
)
from services.gateway.domain.admission import no_replica, too_late
from services.gateway.domain.chunk_order import ChunkOrder, ChunkPlace
from services.gateway.domain.envelope_size import MAX_FRAMES, frames_per_envelope, split
from services.gateway.domain.fair_lane import NO_CALLER, FairLane, FlowKey
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection, Delivery, Refused, Unroutable
from tidegate.kernel.broker.topology import CANCELS, EVENTS, Queue, replies_queue, sequences_queue
from tidegate.kernel.errors import TidegateError, Unavailable, WorkerLost
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply
from tidegate.kernel.protocol.llm import KEPT_MS, band_of
from tidegate.kernel.protocol.presence import GatewayLoad
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)


class Dispatcher:
    """A publisher of requests and a consumer of their replies. Each process has one.

    ``incarnation``: the random id of this process. It is part of the name of the reply queue.
    """

    def __init__(
        self,
        amqp_url: str,
        incarnation: bytes,
        fleet: Callable[[str], ReplicaFleet],
        *,
        claims: Claims,
        answers: MemoryBudget,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        self._incarnation, self._claims = incarnation, claims
        self._max_frames = max_frames
        self._fleet = fleet
        self._reply_to = replies_queue(incarnation.hex())
        self._numbers = count(1)
        self._pending: dict[bytes, PendingRequest] = {}
        self._queues: dict[str, DeploymentQueue] = {}
        self._declared: set[str] = set()
        self._flush_due = False
        self._tasks = TaskSet()
        # Called with each reply that no pending request waits for: a reply to a shadow copy, or a late reply.
        self.on_other_reply: Callable[[Reply], None] = lambda _: None
        self._loop: asyncio.AbstractEventLoop
        self.out = Connection(amqp_url, "gateway-out", self._on_out_setup, on_up=self._resend, fast=True)
        self.back = Connection(
            amqp_url, "gateway-in", self._on_back_setup, self._on_back_down, on_up=self.out.start, fast=True
        )
        self._back_down_at = inf
        self._events = EventPublisher(self.out, self._tasks.start)
        self._claim_fetcher = ReplyClaimFetcher(
            claims,
            answers,
            self._pending,
            on_reply=self._answer,
            on_failure=self.fail,
            spawn=self._tasks.start,
        )

    def start(self) -> None:
        """Connect to the broker: first for replies, because a reply without a queue would be lost."""
        self._loop = asyncio.get_running_loop()
        self.back.start()

    async def stop(self) -> None:
        """Fail the requests in flight and disconnect."""
        for id_ in list(self._pending):
            self.fail(id_, Unavailable("the gateway is stopping"))
        await self.back.stop()  # first, because it starts `out` when it is connected
        await self.out.stop()

    @property
    def reply_to(self) -> str:
        """Return the name of the queue of this process's replies."""
        return self._reply_to.name

    def problem(self) -> str | None:
        """Return why requests cannot be published or answered; None if they can."""
        return self.back.problem or self.out.problem

    def queue_of(self, route: DeploymentRoute) -> DeploymentQueue:
        """Return this process's queue for a Deployment. The first call for the Deployment creates it."""
        queue = self._queues.get(route.name)
        if queue is None:
            queue = self._queues[route.name] = DeploymentQueue(route.queue)
            queue.learn(self._fleet(route.name))
        return queue

    def outstanding(self, deployment: str) -> int:
        """Return how many requests to a Deployment wait for their answer."""
        queue = self._queues.get(deployment)
        return 0 if queue is None else queue.load.outstanding

    def loads(self) -> dict[str, GatewayLoad]:
        """Return the counters of every Deployment for which this process has had requests."""
        return {name: queue.report() for name, queue in self._queues.items()}

    def new_id(self) -> bytes:
        """Return an id for a request that will be sent later."""
        return self._incarnation + next(self._numbers).to_bytes(8, "little")

    def send(
        self,
        route: DeploymentRoute,
        rows: int,
        key: bytes,
        data: list[Buffer],
        timeout_s: float,
        trace: bytes,
        done: OnReply,
        *,
        priority: int = 0,
        stream: bool = False,
        replica: str = "",
        wait_ms: float = 0.0,
        caller: FlowKey = NO_CALLER,
        cost: float = 0.0,
        id_: bytes = b"",
        keeper: str = "",
    ) -> bytes:
        """Queue a request and return its id. After that, ``done`` is called with the reply or an error.

        Callers share the Deployment by weight. ``cost``: the units that the request takes from its caller's
        share; if it is 0, the request takes one unit for each of its ``rows``. ``replica``: for a language
        model, the preferred replica. The request waits in this replica's queue for at most ``wait_ms``.
        ``keeper``: the replica of the request's sequence. A request of a sequence is never sent again.

        With ``stream``, ``done`` is called with each chunk, and last with END or an error. A request to a
        language model or of a sequence has a message of its own. Other requests to one Deployment share
        messages if they are ready in the same event-loop turn. They are published at its end.
        """
        loop = self._loop
        queue = self.queue_of(route)
        id_ = id_ or self._incarnation + next(self._numbers).to_bytes(8, "little")
        deadline_ms = int((time.time() + timeout_s) * 1e3)
        flags = (envelope.RETRY_SAFE if route.retry_safe else 0) | priority << envelope.PRIORITY_SHIFT
        if stream:
            flags |= envelope.STREAM
        lane: Lane | None = None
        fair = queue.lane
        if stream and route.format == "llm":
            band = band_of(flags)
            lane, fair = lane_of(route.name, band, replica, wait_ms), queue.band(band)
        elif keeper:
            flags &= ~envelope.RETRY_SAFE
            lane, fair = Lane(sequences_queue(route.name, keeper), sequence=True), queue.sequences
        flow = fair.flow(caller)
        size = sum(map(len, data))
        frame: bytes | list[Buffer] | None = None
        if size <= envelope.LARGE or not self._claims.needed(size):
            frame = frame_of(id_, deadline_ms, rows, key, data, flow.tenant, trace, flags, size)
        end, timer = loop.time() + timeout_s, loop.call_later(timeout_s, self._expire, id_)
        pending = PendingRequest(
            id_, done, route, frame, size, end, timer, timeout_s, fair, flow, cost or rows or 1, priority
        )
        if stream:
            pending.order, pending.lane = ChunkOrder(), lane
        elif keeper:
            pending.lane = lane
        self._pending[id_] = pending
        queue.begin(pending)
        if frame is None:
            framed = partial(
                frame_of, id_, deadline_ms, rows, key,
                tenant=flow.tenant, trace=trace, flags=flags | envelope.CLAIM,
            )  # fmt: skip
            self._tasks.start(self._upload(queue, pending, data, framed))
        else:
            self._enqueue(queue, pending)
        return id_

    def uploads(self, id_: bytes) -> bool:
        """Return True while a request waits in a :class:`FairLane`, or its data is being uploaded."""
        return (pending := self._pending.get(id_)) is not None and not pending.published

    def _enqueue(self, queue: DeploymentQueue, pending: PendingRequest) -> None:
        """Publish a request in this event-loop turn. If its :class:`FairLane` is full, hold the request."""
        if pending.fair.take(pending.flow, pending.cost):
            pending.published = True
            self._add(queue, pending)
        else:
            pending.fair.hold(pending.flow, pending, pending.priority, pending.cost)

    def _release(self, queue: DeploymentQueue, fair: FairLane[PendingRequest]) -> None:
        """Publish the held requests for which the :class:`FairLane` now has room."""
        for pending in fair.release():
            if pending.id in self._pending:
                pending.published = True
                self._add(queue, pending)
            else:
                fair.skip(pending.flow, pending.cost)

    def _add(self, queue: DeploymentQueue, pending: PendingRequest) -> None:
        if pending.lane is not None:
            self._publish_alone(pending, pending.lane)
            return
        queue.waiting.append(pending)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    async def _upload(
        self, queue: DeploymentQueue, pending: PendingRequest, data: list[Buffer], framed: Framed
    ) -> None:
        """Upload a request's data to the blob store. Then queue the request with a claim to the data."""
        try:
            claim = await self._claims.give(data, pending.deadline - self._loop.time())
        except Unavailable as error:
            self.fail(pending.id, error)
            return
        if pending.id not in self._pending:
            await self._claims.drop(claim)
        else:
            pending.claim = claim
            pending.frame = framed(data=[claim], size=len(claim))
            self._enqueue(queue, pending)

    def abandon(self, id_: bytes) -> None:
        """Drop a request whose caller has disconnected, and try to tell the workers to drop it too."""
        if self._settle(id_) is not None:
            self._events.cancel(id_)

    def _publish_alone(self, pending: PendingRequest, lane: Lane) -> None:
        """Publish a request alone in a message. The worker acks the message when the answer has ended."""
        channel = self.out.channel
        if channel is None or pending.id not in self._pending:
            return  # the request is sent after the reconnect, or it has ended already
        if self._fleet(pending.route.name).ready == 0:
            self._events.demand(channel, pending.route.name)
        if lane.own is not None:
            self._send_to_replica(channel, pending, lane, lane.own)
        elif lane.sequence or lane.shared.name in self._declared:
            self._publish(channel, lane.shared, [pending])
        else:
            self._tasks.start(self._declare(channel, lane.shared, [pending]))

    def _send_to_replica(self, channel: Channel, pending: PendingRequest, lane: Lane, queue: Queue) -> None:
        """Publish a request to its preferred replica's queue. If this is impossible, use the shared queue."""

        def on_failure(error: Unavailable) -> None:
            if isinstance(error, Unroutable | Refused):  # otherwise, the request is sent after the reconnect
                self._publish_alone(pending, lane)

        assert pending.frame is not None
        pending.sent, lane.own = True, None
        try:
            channel.send(
                message_of([pending.frame]),
                routing_key=queue.name,
                expiration_ms=lane.wait_ms,
                reply_to=self._reply_to.name,
                mandatory=True,
                on_failure=on_failure,
            )
        except Unavailable as error:
            on_failure(error)

    def _flush(self) -> None:
        self._flush_due = False
        channel = self.out.channel
        if channel is None:
            return  # requests stay queued until the reconnect or their deadline
        for name, queue in list(self._queues.items()):
            if not queue.waiting:
                continue
            waiting, queue.waiting = queue.waiting, []
            fleet = self._fleet(name)
            if fleet.ready == 0:
                self._events.demand(channel, name)
            most = frames_per_envelope(len(waiting), fleet, self._max_frames)
            for start, end in split([pending.size for pending in waiting], most):
                if queue.amqp_queue.name not in self._declared:
                    self._tasks.start(self._declare(channel, queue.amqp_queue, waiting[start:end]))
                    continue
                self._publish(channel, queue.amqp_queue, waiting[start:end])

    async def _declare(self, channel: Channel, queue: Queue, batch: list[PendingRequest]) -> None:
        try:
            await channel.declare(queue)
        except Unavailable as error:
            self._on_publish_failure(queue, batch, error)
        else:
            self._declared.add(queue.name)
            self._publish(channel, queue, batch)

    def _publish(self, channel: Channel, queue: Queue, batch: list[PendingRequest]) -> None:
        live = [pending for pending in batch if pending.id in self._pending]
        if not live:
            return
        now = self._loop.time()
        expiration_ms = int((max(pending.deadline for pending in live) - now) * 1e3)
        if live[0].lane is not None:
            expiration_ms += KEPT_MS
        for pending in live:
            pending.sent = True
        on_failure = partial(self._on_publish_failure, queue, live)
        try:
            channel.send(
                message_of([pending.frame for pending in live if pending.frame is not None]),
                routing_key=queue.name,
                expiration_ms=expiration_ms,
                reply_to=self._reply_to.name,
                mandatory=True,
                on_failure=on_failure,
            )
        except Unavailable as error:
            on_failure(error)
        except Exception:  # an error in one envelope must not stop the others
            log.exception("an envelope of requests could not be sent", extra={"queue": queue.name})
            for pending in live:
                self.fail(pending.id, Unavailable("the request could not be sent"))

    def _on_publish_failure(self, queue: Queue, batch: list[PendingRequest], error: Unavailable) -> None:
        if isinstance(error, Unroutable):
            # The queue was deleted. These requests fail. The next request declares the queue again.
            self._declared.discard(queue.name)
        failure = publish_failure(queue, error, batch[0].lane)
        if failure is None:
            log.info(
                "the connection to the broker was lost; requests that may be retried are sent again later",
                extra={"queue": queue.name},
            )
            return
        for pending in batch:
            self.fail(pending.id, failure)

    async def _on_out_setup(self, channel: Channel) -> None:
        self._declared.clear()
        await channel.declare(EVENTS)
        await channel.declare(CANCELS)

    def _resend(self) -> None:
        """Send requests after a reconnect: requests that were not sent, and requests that may be lost.

        A request is sent again only once. Two kinds of requests are not sent again, but fail: requests of a
        sequence, and requests to a Deployment with ``retry: never``.
        """
        again: dict[str, list[PendingRequest]] = defaultdict(list)
        for id_, pending in list(self._pending.items()):
            if pending.frame is None or not pending.published:
                continue
            if (error := never_again(pending)) is not None:
                self.fail(id_, error)
            if error is not None or pending.resent:
                continue
            prepare_again(pending)
            if pending.lane is not None:
                self._publish_alone(pending, pending.lane)
            else:
                again[pending.route.name].append(pending)
        for name, waiting in again.items():
            self._queues[name].waiting = waiting
        self._flush()

    async def _on_back_setup(self, channel: Channel) -> None:
        await channel.declare(self._reply_to)
        await channel.consume(self._reply_to, self._on_replies, prefetch=0, no_ack=True)
        for pending in unheard(self._pending.values(), self._loop.time() - self._back_down_at):
            self._fail_broken(pending, "a part of the stream was lost")

    def _on_back_down(self) -> None:
        self._back_down_at = self._loop.time()

    def _on_replies(self, delivery: Delivery) -> None:
        for reply in replies_in(delivery.body):
            try:
                if reply.claimed or reply.id in self._claim_fetcher.queued:
                    self._claim_fetcher.add(reply)
                else:
                    self._answer(reply)
            except Exception:  # an error in one reply must not stop the others
                log.exception("a reply could not be handled")

    def _answer(self, reply: Reply) -> None:
        if reply.status >= envelope.CHUNK:
            self._on_streamed(reply)
            return
        pending = self._settle(reply.id)
        if pending is not None:
            pending.done(reply)
        else:
            self.on_other_reply(reply)

    def _on_streamed(self, reply: Reply) -> None:
        """Pass a chunk or the end of a stream to the request that it answers."""
        pending, end = self._pending.get(reply.id), reply.status == envelope.END
        if pending is None or pending.order is None:
            if not end:
                self._events.cancel(reply.id)  # the caller has gone, but the worker still runs the stream
            return
        match pending.order.place(reply.attempt, reply.seq, end=end):
            case ChunkPlace.NEXT:
                # The caller has this chunk now. So the request must not be sent again, and its frame is
                # dropped. When the timer fires, it checks the new deadline.
                pending.frame, pending.deadline = None, self._loop.time() + pending.timeout_s
                if end:
                    self._settle(reply.id)
                pending.done(reply)
            case ChunkPlace.RESTARTED:
                self._fail_broken(pending, "the worker ended in the middle of the stream")
            case ChunkPlace.GAP:
                self._fail_broken(pending, "a part of the stream was lost")

    def _fail_broken(self, pending: PendingRequest, problem: str) -> None:
        """Cancel and fail a stream whose next chunk is missing.

        For a language model or a sequence, the error is WorkerLost. The gateway can continue a stream then.
        """
        self._events.cancel(pending.id)
        failure = Unavailable if pending.lane is None else WorkerLost
        self.fail(pending.id, failure(f"{problem}: start the stream again"))

    def _expire(self, id_: bytes) -> None:
        pending = self._pending[id_]
        if pending.order is None:
            self.fail(id_, self._too_late(pending, "the deadline passed before the answer arrived"))
        elif (left := pending.deadline - self._loop.time()) > 0:
            pending.timer = self._loop.call_later(left, self._expire, id_)
        else:
            self._events.cancel(id_)  # the worker runs the stream until this cancel reaches it
            what = "next" if pending.order.emitted else "first"
            passed = f"the {what} part of the stream did not arrive within {pending.timeout_s:g} s"
            self.fail(id_, self._too_late(pending, passed))

    def _too_late(self, pending: PendingRequest, passed: str) -> TidegateError:
        """Return the error for a passed deadline. If no replica can start, the error says why."""
        fleet, waited_s = self._fleet(pending.route.name), pending.timeout_s
        held = None if pending.published else pending.flow.outstanding
        return too_late(pending.route.name, fleet, passed, waited_s=waited_s, held=held)

    def on_fleets(self, _: Mapping[str, ReplicaFleet]) -> None:
        """Publish as many held requests as replicas can take. Fail requests to a model that cannot load."""
        for name, queue in list(self._queues.items()):
            fleet = self._fleet(name)
            queue.learn(fleet)
            for lane in list(queue.lanes.values()):
                self._release(queue, lane)
            if fleet.load_failed and queue.load.outstanding:
                error = no_replica(fleet, name)
                for id_ in [id_ for id_, each in self._pending.items() if each.route.name == name]:
                    self.fail(id_, error)

    def fail(self, id_: bytes, error: TidegateError) -> None:
        """End a request with an error, because it will have no answer."""
        pending = self._settle(id_)
        if pending is not None:
            pending.done(error)

    def _settle(self, id_: bytes) -> PendingRequest | None:
        """Remove a request and count it as completed, exactly once. Return None if it was removed before."""
        pending = self._pending.pop(id_, None)
        if pending is not None:
            pending.timer.cancel()
            if pending.claim is not None:
                self._tasks.start(self._claims.drop(pending.claim))
            queue = self._queues[pending.route.name]
            if (lane := queue.settle(pending)).held:
                self._release(queue, lane)
        return pending

    def demand(self, route: DeploymentRoute) -> None:
        """Publish a demand event for a Deployment that refused a request, so that a replica can start."""
        self.queue_of(route)  # create the queue: the heartbeat reports only Deployments with a queue
        if self.out.channel is not None:
            self._events.demand(self.out.channel, route.name)

"""Requests out in envelopes, replies back to whoever waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

from services.gateway.adapters.claim_fetcher import ReplyClaimFetcher
from services.gateway.adapters.event_publisher import EventPublisher
from services.gateway.adapters.pending_requests import (
    DeploymentQueue,
    OnReply,
    PendingRequest,
    message_of,
    renumbered,
)
from services.gateway.domain.admission import no_replica
from services.gateway.domain.chunk_order import ChunkOrder, ChunkPlace
from services.gateway.domain.envelope_size import MAX_FRAMES, frames_per_envelope, split
from services.gateway.domain.memory_budget import MemoryBudget
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel import telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.broker.connection import Channel, Connection, Delivery, Refused, Unroutable
from tidegate.kernel.broker.topology import CANCELS, EVENTS, Queue, replies_queue
from tidegate.kernel.errors import DeadlinePassed, TidegateError, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Buffer, Reply
from tidegate.kernel.protocol.presence import GatewayLoad

log = telemetry.logger(__name__)


class Dispatcher:
    """The gateway's side of the request queues. One per process; its incarnation names the reply queue."""

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
        self._incarnation = incarnation
        self._claims = claims
        self._max_frames = max_frames
        self._fleet = fleet
        self._reply_to = replies_queue(incarnation.hex())
        self._counter = 0
        self._pending: dict[bytes, PendingRequest] = {}
        self._lanes: dict[str, DeploymentQueue] = {}
        self._declared: set[str] = set()
        self._flush_due = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop
        self.out = Connection(amqp_url, "gateway-out", self._on_out_setup, on_up=self._resend)
        self.back = Connection(amqp_url, "gateway-in", self._on_back_setup)
        self._hints = EventPublisher(self.out, self._spawn)
        self._redeemer = ReplyClaimFetcher(
            claims,
            answers,
            self._pending,
            on_reply=self._answer,
            on_failure=self._fail,
            spawn=self._spawn,
        )

    def start(self) -> None:
        """Connect."""
        self._loop = asyncio.get_running_loop()
        self.out.start()
        self.back.start()

    async def stop(self) -> None:
        """Disconnect; whoever still waits is told that the gateway stops."""
        for id_ in list(self._pending):
            self._fail(id_, Unavailable("the gateway is stopping"))
        await self.out.stop()
        await self.back.stop()

    def problem(self) -> str | None:
        """What keeps requests from flowing, if anything."""
        return self.out.problem or self.back.problem

    def lane(self, route: DeploymentRoute) -> DeploymentQueue:
        """The lane of a Deployment."""
        found = self._lanes.get(route.name)
        if found is None:
            found = self._lanes[route.name] = DeploymentQueue(route.queue)
        return found

    def loads(self) -> dict[str, GatewayLoad]:
        """The counters of every Deployment that had requests here."""
        return {name: lane.load for name, lane in self._lanes.items()}

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
    ) -> bytes:
        """Queue a request and give its id; ``done`` is called with its outcome, never before this returns.

        With ``stream`` that is called with each chunk, and at last with the END or with what went wrong.
        The frame leaves at the end of this turn of the event loop, together with the others of its
        Deployment.
        """
        loop = self._loop
        self._counter += 1
        id_ = self._incarnation + self._counter.to_bytes(8, "little")
        deadline_ms = int((time.time() + timeout_s) * 1e3)
        flags = (envelope.RETRY_SAFE if route.retry_safe else 0) | priority << envelope.PRIORITY_SHIFT
        if stream:
            flags |= envelope.STREAM
        size = sum(map(len, data))
        frame: bytes | list[Buffer] | None = None
        if size <= envelope.LARGE:
            frame = envelope.request_frame(id_, deadline_ms, rows, key, data, trace=trace, flags=flags)
        elif not self._claims.needed(size):
            head = envelope.request_head(id_, deadline_ms, rows, key, data, trace=trace, flags=flags)
            frame = [head, *data]
        timer = loop.call_later(timeout_s, self._expire, id_)
        order = ChunkOrder() if stream else None
        pending = PendingRequest(
            id_, done, route, frame, size, loop.time() + timeout_s, timer, timeout_s, order
        )
        self._pending[id_] = pending
        lane = self.lane(route)
        lane.load.outstanding += 1
        lane.load.arrived += 1
        if frame is None:
            self._spawn(self._check_in(lane, pending, data, deadline_ms, rows, key, trace, flags))
        else:
            self._queue(lane, pending)
        return id_

    def _queue(self, lane: DeploymentQueue, pending: PendingRequest) -> None:
        lane.waiting.append(pending)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    async def _check_in(
        self,
        lane: DeploymentQueue,
        pending: PendingRequest,
        data: list[Buffer],
        deadline_ms: int,
        rows: int,
        key: bytes,
        trace: bytes,
        flags: int,
    ) -> None:
        """Put a request's data into the blob store; then it leaves with a claim in its place."""
        try:
            claim = await self._claims.give(data, pending.deadline - self._loop.time())
        except Unavailable as error:
            self._fail(pending.id, error)
            return
        if pending.id not in self._pending:
            await self._claims.drop(claim)
        else:
            pending.claim = claim
            pending.frame = envelope.request_frame(
                pending.id, deadline_ms, rows, key, [claim], trace=trace, flags=flags | envelope.CLAIM
            )
            self._queue(lane, pending)

    def abandon(self, id_: bytes) -> None:
        """The caller has gone: forget the request and tell the workers, best effort."""
        if self._settle(id_) is not None:
            self._hints.cancel(id_)

    def _flush(self) -> None:
        self._flush_due = False
        channel = self.out.channel
        if channel is None:
            return  # everything waits in its lane for the link, or for its own deadline
        for name, lane in list(self._lanes.items()):
            if not lane.waiting:
                continue
            waiting, lane.waiting = lane.waiting, []
            fleet = self._fleet(name)
            if fleet.ready == 0:
                self._hints.demand(channel, name)
            most = frames_per_envelope(len(waiting), fleet, self._max_frames)
            for start, end in split([pending.size for pending in waiting], most):
                if lane.queue.name not in self._declared:
                    self._spawn(self._declare(channel, lane.queue, waiting[start:end]))
                    continue
                self._publish(channel, lane.queue, waiting[start:end])

    async def _declare(self, channel: Channel, queue: Queue, batch: list[PendingRequest]) -> None:
        try:
            await channel.declare(queue)
        except Unavailable as error:
            self._on_not_taken(queue, batch, error)
        else:
            self._declared.add(queue.name)
            self._publish(channel, queue, batch)

    def _publish(self, channel: Channel, queue: Queue, batch: list[PendingRequest]) -> None:
        live = [pending for pending in batch if pending.id in self._pending]
        if not live:
            return
        now = self._loop.time()
        expiration_ms = int((max(pending.deadline for pending in live) - now) * 1e3)
        for pending in live:
            pending.sent = True
        on_failure = partial(self._on_not_taken, queue, live)
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
        except Exception:  # nobody thought of it; it must not take the other envelopes along
            log.exception("an envelope was not sent", extra={"queue": queue.name})
            for pending in live:
                self._fail(pending.id, Unavailable("the request could not be sent"))

    def _on_not_taken(self, queue: Queue, batch: list[PendingRequest], error: Unavailable) -> None:
        if isinstance(error, Unroutable):
            # Somebody deleted the queue. Declaring it again is for the next request; this one is told.
            self._declared.discard(queue.name)
            error = Unavailable(
                f"the queue {queue.name} was deleted: send the request again, which makes a new one",
                retry_after_s=1.0,
            )
        elif isinstance(error, Refused):
            error = Unavailable(error.message, retry_after_s=error.retry_after_s or 1.0)
        else:
            log.info(
                "publish interrupted; it is sent again when the broker is back", extra={"queue": queue.name}
            )
            return
        for pending in batch:
            self._fail(pending.id, error)

    async def _on_out_setup(self, channel: Channel) -> None:
        self._declared.clear()
        await channel.declare(EVENTS)
        await channel.declare(CANCELS)

    def _resend(self) -> None:
        """After a reconnect: send what never left, and, once, what may have been lost with the broker."""
        again: dict[str, list[PendingRequest]] = defaultdict(list)
        for id_, pending in list(self._pending.items()):
            if pending.frame is None:
                continue
            if pending.sent and (pending.resent or not pending.route.retry_safe):
                if not pending.route.retry_safe:
                    self._fail(
                        id_,
                        Unavailable(
                            "the broker was lost after this request was sent; its deployment says retry: "
                            "never, so it was not sent twice"
                        ),
                    )
                continue
            if pending.sent and pending.order is not None:
                # The first sending may run too. Its chunks must not mix with those of the second.
                pending.order.attempt += 1
                pending.frame = renumbered(pending.frame, pending.order.attempt)
            pending.resent = pending.sent
            again[pending.route.name].append(pending)
        for name, waiting in again.items():
            self._lanes[name].waiting = waiting
        self._flush()

    async def _on_back_setup(self, channel: Channel) -> None:
        await channel.declare(self._reply_to)
        await channel.consume(self._reply_to, self._on_replies, prefetch=0, no_ack=True)

    def _on_replies(self, delivery: Delivery) -> None:
        try:
            replies = [envelope.read_reply(f) for f in envelope.unpack(envelope.REPLIES, delivery.body)]
        except envelope.Undecodable as error:
            log.error("undecodable reply envelope", extra={"problem": str(error)})
            return
        for reply in replies:
            try:
                if reply.claimed or reply.id in self._redeemer.behind:
                    self._redeemer.take(reply)
                else:
                    self._answer(reply)
            except Exception:  # nobody thought of it; it must not take the other replies along
                log.exception("a reply was not handled")

    def _answer(self, reply: Reply) -> None:
        if reply.status >= envelope.CHUNK:
            self._on_streamed(reply)
            return
        pending = self._settle(reply.id)
        if pending is not None:
            pending.done(reply)

    def _on_streamed(self, reply: Reply) -> None:
        """A chunk, or the end of a stream."""
        pending, end = self._pending.get(reply.id), reply.status == envelope.END
        if pending is None or pending.order is None:
            if not end:
                self._hints.cancel(reply.id)  # nobody reads it any more, and its worker has not heard of that
            return
        match pending.order.place(reply.attempt, reply.seq, end=end):
            case ChunkPlace.NEXT:
                # Never sent again from now on. Its timer looks at the deadline when it fires.
                pending.frame, pending.deadline = None, self._loop.time() + pending.timeout_s
                if end:
                    self._settle(reply.id)
                pending.done(reply)
            case ChunkPlace.RESTARTED:
                self._hints.cancel(reply.id)
                self._fail(
                    reply.id, Unavailable("the worker was lost in the middle of the stream: start it again")
                )
            case ChunkPlace.GAP:
                self._hints.cancel(reply.id)
                self._fail(reply.id, Unavailable("a part of the stream was lost: start it again"))

    def _expire(self, id_: bytes) -> None:
        pending = self._pending[id_]
        if pending.order is None:
            self._fail(id_, self._too_late(pending, "the deadline passed before an answer was there"))
        elif (left := pending.deadline - self._loop.time()) > 0:
            pending.timer = self._loop.call_later(left, self._expire, id_)
        else:
            self._hints.cancel(id_)  # a stream runs until it is told
            what = "next" if pending.order.emitted else "first"
            passed = f"{pending.timeout_s:g} s passed before the {what} part of the stream was there"
            self._fail(id_, self._too_late(pending, passed))

    def _too_late(self, pending: PendingRequest, passed: str) -> TidegateError:
        """The error for a deadline that passed: where no replica starts, that is why."""
        name = pending.route.name
        fleet = self._fleet(name)
        return no_replica(fleet, name) if fleet.fault and not fleet.ready else DeadlinePassed(passed)

    def heard(self, fleets: Mapping[str, ReplicaFleet]) -> None:
        """Fail the requests that wait for a model that does not load: new ones are refused as well."""
        for name, fleet in fleets.items():
            lane = self._lanes.get(name) if fleet.load_failed else None
            if lane is not None and lane.load.outstanding:
                error = no_replica(fleet, name)
                for id_ in [id_ for id_, each in self._pending.items() if each.route.name == name]:
                    self._fail(id_, error)

    def _fail(self, id_: bytes, error: TidegateError) -> None:
        pending = self._settle(id_)
        if pending is not None:
            pending.done(error)

    def _settle(self, id_: bytes) -> PendingRequest | None:
        """Take a request off the books, exactly once: every path ends here."""
        pending = self._pending.pop(id_, None)
        if pending is not None:
            pending.timer.cancel()
            if pending.claim is not None:
                self._spawn(self._claims.drop(pending.claim))
            load = self._lanes[pending.route.name].load
            load.outstanding -= 1
            load.completed += 1
        return pending

    def demand(self, route: DeploymentRoute) -> None:
        """Say that a Deployment is wanted although nothing was queued: a refusal is demand too."""
        self.lane(route)  # its load is told from now on
        if self.out.channel is not None:
            self._hints.demand(self.out.channel, route.name)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

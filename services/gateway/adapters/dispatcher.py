"""Requests out in envelopes, replies back to whoever waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from services.gateway.domain.admission import Fleet
from services.gateway.domain.packing import MAX_FRAMES, frames_per_envelope, split
from services.gateway.domain.routing import DeploymentRoute
from tidegate import telemetry
from tidegate.broker import Delivery, Link, Refused, Session, Unroutable
from tidegate.errors import DeadlinePassed, TidegateError, Unavailable
from tidegate.protocol import envelope
from tidegate.protocol.envelope import Buffer, Reply
from tidegate.protocol.presence import GatewayLoad
from tidegate.topology import CANCELS, EVENTS, Queue, demand_key, replies_queue

log = telemetry.logger(__name__)

DEMAND_EVERY_S = 1.0


Outcome = Reply | TidegateError
OnOutcome = Callable[[Outcome], None]


@dataclass(slots=True)
class Pending:
    """A request that waits for its reply; ``done`` is called once, with the reply or what went wrong."""

    done: OnOutcome
    route: DeploymentRoute
    frame: bytes
    deadline: float
    timer: asyncio.TimerHandle
    sent: bool = False
    resent: bool = False


@dataclass(slots=True)
class Lane:
    """What goes to one Deployment: frames of this turn of the event loop, and its counters."""

    queue: Queue
    waiting: list[bytes] = field(default_factory=list)
    load: GatewayLoad = field(default_factory=GatewayLoad)
    demand_at: float = 0.0


class Dispatcher:
    """The gateway's side of the request queues. One per process; its incarnation names the reply queue."""

    def __init__(
        self,
        amqp_url: str,
        incarnation: bytes,
        fleet: Callable[[str], Fleet],
        *,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        self._incarnation = incarnation
        self._max_frames = max_frames
        self._fleet = fleet
        self._reply_to = replies_queue(incarnation.hex())
        self._counter = 0
        self._pending: dict[bytes, Pending] = {}
        self._lanes: dict[str, Lane] = {}
        self._declared: set[str] = set()
        self._flush_due = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancelled: list[bytes] = []
        self._loop: asyncio.AbstractEventLoop
        self.out = Link(amqp_url, "gateway-out", self._on_out_setup, on_up=self._resend)
        self.back = Link(amqp_url, "gateway-in", self._on_back_setup)

    def start(self) -> None:
        """Connect."""
        self._loop = asyncio.get_running_loop()
        self.out.start()
        self.back.start()

    async def stop(self) -> None:
        """Disconnect; whoever still waits is told that the gateway stops."""
        for pending in list(self._pending.values()):
            self._fail(pending.frame[:16], Unavailable("the gateway is stopping"))
        await self.out.stop()
        await self.back.stop()

    def problem(self) -> str | None:
        """What keeps requests from flowing, if anything."""
        return self.out.problem or self.back.problem

    def lane(self, route: DeploymentRoute) -> Lane:
        """The lane of a Deployment."""
        found = self._lanes.get(route.name)
        if found is None:
            found = self._lanes[route.name] = Lane(route.queue)
        return found

    def loads(self) -> dict[str, GatewayLoad]:
        """The counters of every Deployment that had requests here."""
        return {name: lane.load for name, lane in self._lanes.items()}

    def submit(
        self,
        route: DeploymentRoute,
        rows: int,
        key: bytes,
        data: list[Buffer],
        timeout_s: float,
        trace: bytes,
    ) -> tuple[bytes, asyncio.Future[Reply]]:
        """Queue a request; gives its id and the future of its reply, which raises what went wrong."""
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def done(outcome: Outcome) -> None:
            if future.done():
                return
            if isinstance(outcome, TidegateError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        return self.send(route, rows, key, data, timeout_s, trace, done), future

    def send(
        self,
        route: DeploymentRoute,
        rows: int,
        key: bytes,
        data: list[Buffer],
        timeout_s: float,
        trace: bytes,
        done: OnOutcome,
    ) -> bytes:
        """Queue a request and give its id; ``done`` is called with its outcome, never before this returns.

        The frame leaves at the end of this turn of the event loop, together with the others of its
        Deployment.
        """
        loop = self._loop
        self._counter += 1
        id_ = self._incarnation + self._counter.to_bytes(8, "little")
        deadline_ms = int((time.time() + timeout_s) * 1e3)
        flags = envelope.RETRY_SAFE if route.retry_safe else 0
        frame = envelope.request_frame(id_, deadline_ms, rows, key, data, trace=trace, flags=flags)
        timer = loop.call_later(timeout_s, self._expire, id_)
        self._pending[id_] = Pending(done, route, frame, loop.time() + timeout_s, timer)
        lane = self.lane(route)
        lane.load.outstanding += 1
        lane.load.arrived += 1
        lane.waiting.append(frame)
        if not self._flush_due:
            self._flush_due = True
            loop.call_soon(self._flush)
        return id_

    def abandon(self, id_: bytes) -> None:
        """The caller has gone: forget the request and tell the workers, best effort."""
        if self._settle(id_) is not None:
            self._cancelled.append(id_)
            self._spawn(self._publish_cancels())

    def _flush(self) -> None:
        self._flush_due = False
        session = self.out.session
        if session is None:
            return  # everything waits in its lane for the link, or for its own deadline
        for name, lane in self._lanes.items():
            if not lane.waiting:
                continue
            frames, lane.waiting = lane.waiting, []
            fleet = self._fleet(name)
            if fleet.ready == 0:
                self._demand(session, name, lane)
            most = frames_per_envelope(len(frames), fleet, self._max_frames)
            for start, end in split([len(frame) for frame in frames], most):
                self._spawn(self._publish(session, lane.queue, frames[start:end]))

    async def _publish(self, session: Session, queue: Queue, frames: list[bytes]) -> None:
        live = [(f, p) for f in frames if (p := self._pending.get(f[:16])) is not None]
        if not live:
            return
        now = self._loop.time()
        expiration_ms = int((max(p.deadline for _, p in live) - now) * 1e3)
        for _, pending in live:
            pending.sent = True
        body = envelope.pack(envelope.REQUESTS, [f for f, _ in live])
        try:
            if queue.name not in self._declared:
                await session.declare(queue)
                self._declared.add(queue.name)
            await session.publish(
                body,
                routing_key=queue.name,
                expiration_ms=expiration_ms,
                reply_to=self._reply_to.name,
                mandatory=True,
            )
        except Unroutable:
            # Somebody deleted the queue. Declaring it again is for the next request; this one is told.
            self._declared.discard(queue.name)
            for frame, _ in live:
                self._fail(frame[:16], Unavailable(f"the queue of {queue.name} has gone", retry_after_s=1.0))
        except Refused as error:
            for frame, _ in live:
                self._fail(frame[:16], Unavailable(error.message, retry_after_s=error.retry_after_s or 1.0))
        except Unavailable:
            log.info(
                "publish interrupted; it is sent again when the broker is back", extra={"queue": queue.name}
            )

    async def _on_out_setup(self, session: Session) -> None:
        self._declared.clear()
        await session.declare(EVENTS)
        await session.declare(CANCELS)

    def _resend(self) -> None:
        """After a reconnect: send what never left, and, once, what may have been lost with the broker."""
        again: dict[str, list[bytes]] = defaultdict(list)
        for id_, pending in list(self._pending.items()):
            if pending.sent and (pending.resent or not pending.route.retry_safe):
                if not pending.route.retry_safe:
                    self._fail(
                        id_, Unavailable("the broker was lost after this request was sent; not sent twice")
                    )
                continue
            pending.resent = pending.sent
            again[pending.route.name].append(pending.frame)
        for name, frames in again.items():
            self._lanes[name].waiting = frames
        self._flush()

    async def _on_back_setup(self, session: Session) -> None:
        await session.declare(self._reply_to)
        await session.consume(self._reply_to, self._on_replies, prefetch=0, no_ack=True)

    def _on_replies(self, delivery: Delivery) -> None:
        try:
            replies = [envelope.read_reply(f) for f in envelope.unpack(envelope.REPLIES, delivery.body)]
        except envelope.Undecodable as error:
            log.error("undecodable reply envelope", extra={"problem": str(error)})
            return
        for reply in replies:
            pending = self._settle(reply.id)
            if pending is not None:
                pending.done(reply)

    def _expire(self, id_: bytes) -> None:
        self._fail(id_, DeadlinePassed("the deadline passed before an answer was there"))

    def _fail(self, id_: bytes, error: TidegateError) -> None:
        pending = self._settle(id_)
        if pending is not None:
            pending.done(error)

    def _settle(self, id_: bytes) -> Pending | None:
        """Take a request off the books, exactly once: every path ends here."""
        pending = self._pending.pop(id_, None)
        if pending is not None:
            pending.timer.cancel()
            load = self._lanes[pending.route.name].load
            load.outstanding -= 1
            load.completed += 1
        return pending

    def _demand(self, session: Session, name: str, lane: Lane) -> None:
        now = time.monotonic()
        if now - lane.demand_at >= DEMAND_EVERY_S:
            lane.demand_at = now
            self._spawn(self._hint(session, name))

    def demand(self, route: DeploymentRoute) -> None:
        """Say that a Deployment is wanted although nothing was queued: a refusal is demand too."""
        if self.out.session is not None:
            self._demand(self.out.session, route.name, self.lane(route))

    async def _hint(self, session: Session, name: str) -> None:
        try:
            await session.publish(
                b'{"deployment":"%s"}' % name.encode(), exchange=EVENTS.name, routing_key=demand_key(name)
            )
        except Unavailable:
            log.info("a demand hint was lost with the broker", extra={"deployment": name})

    async def _publish_cancels(self) -> None:
        ids, self._cancelled = self._cancelled, []
        if not ids or self.out.session is None:
            return
        try:
            body = envelope.pack(envelope.CANCELS, list(ids))
            await self.out.session.publish(body, exchange=CANCELS.name, routing_key="")
        except Unavailable:
            log.info("cancels were lost with the broker", extra={"count": len(ids)})

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

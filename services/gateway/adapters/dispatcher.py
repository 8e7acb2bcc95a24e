"""Requests out in envelopes, replies back to whoever waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from services.gateway.domain.admission import Fleet
from services.gateway.domain.budget import Budget
from services.gateway.domain.ordering import Ordering, Place
from services.gateway.domain.packing import MAX_FRAMES, frames_per_envelope, split
from services.gateway.domain.routing import DeploymentRoute
from tidegate import telemetry
from tidegate.broker import Delivery, Link, Refused, Session, Unroutable
from tidegate.claims import Claims
from tidegate.errors import DeadlinePassed, TidegateError, Unavailable
from tidegate.protocol import envelope
from tidegate.protocol.envelope import Buffer, Reply
from tidegate.protocol.presence import GatewayLoad
from tidegate.topology import CANCELS, EVENTS, Queue, demand_key, replies_queue

log = telemetry.logger(__name__)

DEMAND_EVERY_S = 1.0
ROOM_POLL_S = 0.01


Outcome = Reply | TidegateError
OnOutcome = Callable[[Outcome], None]


@dataclass(slots=True)
class Pending:
    """A request that waits for its reply; ``done`` is called once, with the reply or what went wrong.

    With ``order`` the caller takes many answers: ``done`` is called with each chunk and then with the end,
    and each chunk moves the deadline: ``timeout_s`` is then the longest time between two.

    ``frame`` is in pieces when it is large, and None while its data is on the way to the blob store; ``size``
    counts that data too, as it is what the worker will hold.
    """

    id: bytes
    done: OnOutcome
    route: DeploymentRoute
    frame: bytes | list[Buffer] | None
    size: int
    deadline: float
    timer: asyncio.TimerHandle
    timeout_s: float
    order: Ordering | None = None
    claim: bytes | None = None
    sent: bool = False
    resent: bool = False


@dataclass(slots=True)
class Lane:
    """What goes to one Deployment: frames of this turn of the event loop, and its counters."""

    queue: Queue
    waiting: list[Pending] = field(default_factory=list)
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
        claims: Claims,
        answers: Budget,
        max_frames: int = MAX_FRAMES,
    ) -> None:
        self._incarnation = incarnation
        self._claims = claims
        self._answers = answers
        self._redeeming: dict[bytes, deque[Reply]] = {}
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
        for id_ in list(self._pending):
            self._fail(id_, Unavailable("the gateway is stopping"))
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
        order = Ordering() if stream else None
        pending = Pending(id_, done, route, frame, size, loop.time() + timeout_s, timer, timeout_s, order)
        self._pending[id_] = pending
        lane = self.lane(route)
        lane.load.outstanding += 1
        lane.load.arrived += 1
        if frame is None:
            self._spawn(self._check_in(lane, pending, data, deadline_ms, rows, key, trace, flags))
        else:
            self._queue(lane, pending)
        return id_

    def _queue(self, lane: Lane, pending: Pending) -> None:
        lane.waiting.append(pending)
        if not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    async def _check_in(
        self,
        lane: Lane,
        pending: Pending,
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
            self._cancel(id_)

    def _cancel(self, id_: bytes) -> None:
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
            waiting, lane.waiting = lane.waiting, []
            fleet = self._fleet(name)
            if fleet.ready == 0:
                self._demand(session, name, lane)
            most = frames_per_envelope(len(waiting), fleet, self._max_frames)
            for start, end in split([pending.size for pending in waiting], most):
                self._spawn(self._publish(session, lane.queue, waiting[start:end]))

    async def _publish(self, session: Session, queue: Queue, batch: list[Pending]) -> None:
        live = [pending for pending in batch if pending.id in self._pending]
        if not live:
            return
        now = self._loop.time()
        expiration_ms = int((max(pending.deadline for pending in live) - now) * 1e3)
        for pending in live:
            pending.sent = True
        body = _envelope([pending.frame for pending in live if pending.frame is not None])
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
            for pending in live:
                self._fail(pending.id, Unavailable(f"the queue of {queue.name} has gone", retry_after_s=1.0))
        except Refused as error:
            for pending in live:
                self._fail(pending.id, Unavailable(error.message, retry_after_s=error.retry_after_s or 1.0))
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
        again: dict[str, list[Pending]] = defaultdict(list)
        for id_, pending in list(self._pending.items()):
            if pending.frame is None:
                continue
            if pending.sent and (pending.resent or not pending.route.retry_safe):
                if not pending.route.retry_safe:
                    self._fail(
                        id_, Unavailable("the broker was lost after this request was sent; not sent twice")
                    )
                continue
            if pending.sent and pending.order is not None:
                # The first sending may run too. Its chunks must not mix with those of the second.
                pending.order.attempt += 1
                pending.frame = _renumbered(pending.frame, pending.order.attempt)
            pending.resent = pending.sent
            again[pending.route.name].append(pending)
        for name, waiting in again.items():
            self._lanes[name].waiting = waiting
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
            behind = self._redeeming.get(reply.id)
            if behind is not None:
                behind.append(reply)  # the answers of one request stay in order
            elif not reply.claimed:
                self._answer(reply)
            else:
                self._redeeming[reply.id] = deque((reply,))
                self._spawn(self._redeem(reply.id))

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
                self._cancel(reply.id)  # nobody reads it any more, and its worker has not heard of that
            return
        match pending.order.place(reply.attempt, reply.seq, end=end):
            case Place.NEXT:
                # Never sent again from now on. Its timer looks at the deadline when it fires.
                pending.frame, pending.deadline = None, self._loop.time() + pending.timeout_s
                if end:
                    self._settle(reply.id)
                pending.done(reply)
            case Place.RESTARTED:
                self._cancel(reply.id)
                self._fail(reply.id, Unavailable("the worker was lost in the middle of the stream"))
            case Place.GAP:
                self._cancel(reply.id)
                self._fail(reply.id, Unavailable("a part of the stream was lost on its way"))

    async def _redeem(self, id_: bytes) -> None:
        """Answers whose data is in the blob store, and those behind them."""
        replies = self._redeeming[id_]
        try:
            while replies:
                reply = replies.popleft()
                if reply.claimed:
                    await self._redeem_one(reply)
                    self._spawn(self._claims.drop(reply.data[0]))
                else:
                    self._answer(reply)
        finally:
            del self._redeeming[id_]

    async def _redeem_one(self, reply: Reply) -> None:
        size = self._claims.size(reply.data)
        while reply.id in self._pending and not self._answers.take(size):
            if not self._answers.used:
                self._answers.force(size)  # larger than the limit: alone
                break
            await asyncio.sleep(ROOM_POLL_S)
        if reply.id not in self._pending:
            return
        try:
            data = await self._claims.redeem(reply.data)
            self._answer(reply._replace(data=data))
        except Unavailable as error:
            self._fail(reply.id, error)
        finally:
            self._answers.give(size)

    def _expire(self, id_: bytes) -> None:
        pending = self._pending[id_]
        if pending.order is None:
            self._fail(id_, DeadlinePassed("the deadline passed before an answer was there"))
        elif (left := pending.deadline - self._loop.time()) > 0:
            pending.timer = self._loop.call_later(left, self._expire, id_)
        else:
            self._cancel(id_)  # a stream runs until it is told
            what = "next" if pending.order.emitted else "first"
            passed = f"{pending.timeout_s:g} s passed before the {what} part of the stream was there"
            self._fail(id_, DeadlinePassed(passed))

    def _fail(self, id_: bytes, error: TidegateError) -> None:
        pending = self._settle(id_)
        if pending is not None:
            pending.done(error)

    def _settle(self, id_: bytes) -> Pending | None:
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


def _renumbered(frame: bytes | list[Buffer], attempt: int) -> bytes | list[Buffer]:
    if isinstance(frame, list):
        return [envelope.with_attempt(frame[0], attempt), *frame[1:]]
    return envelope.with_attempt(frame, attempt)


def _envelope(frames: list[bytes | list[Buffer]]) -> bytes | list[Buffer]:
    """Frames as one message; a frame in pieces is alone."""
    if isinstance(frames[0], list):
        return envelope.pack_alone(envelope.REQUESTS, frames[0])
    return envelope.pack(envelope.REQUESTS, [frame for frame in frames if not isinstance(frame, list)])

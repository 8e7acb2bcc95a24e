"""Send the requests of a sequence to the replica that keeps its state, in the order of their arrival.

A new sequence starts on the replica with the most free sequence slots. The choice is kept in the live store,
which all gateways share. So all gateways use the same replica. A request goes to the replica's own queue, and
no other replica gets it. If the replica is lost, the callers of its sequences get an error, because the state
is lost too (ADR 053).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from prometheus_client import Counter

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.adapters.replica_watch import ReplicaWatch
from services.gateway.adapters.store.sequences import SequencePlaces
from services.gateway.application.inference.sequence_request import (
    Line,
    OpenRequests,
    Sender,
    SequenceRequest,
    Turn,
)
from services.gateway.domain import sequences
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.fair_lane import FlowKey
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute
from services.gateway.domain.sequences import Place, SequenceSlots
from tidegate.kernel import telemetry
from tidegate.kernel.broker.topology import Queue, sequences_queue
from tidegate.kernel.errors import BadRequest, DeadlinePassed, SequenceLost, TidegateError, Unavailable
from tidegate.kernel.protocol.sequences import START_FLAG, lost, not_started
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.tasks import TaskSet

log = telemetry.logger(__name__)

SEQUENCES = Counter(
    "tidegate_gateway_sequences_total",
    "Sequences of stateful models by event: started, ended, lost, unknown, full.",
    ["event"],
)
# If all sequence slots are taken, a new sequence waits for a free slot. The longest wait is WAIT_SHARE times
# the timeout of its request, but at most WAIT_S seconds.
WAIT_SHARE, WAIT_S = 0.8, 10.0
POLL_S, UPLOAD_POLL_S = 0.05, 0.005
# After a replica is lost, it may still be reported as ready for some seconds. Treat it as lost for DEAD_S
# seconds.
DEAD_S = 15.0
STARTS = 3
REMEMBERED = 10_000
# After a failed call, the store is not called for this many seconds. Otherwise, each request would wait for a
# store that is down.
AWAY_S = 2.0
T = TypeVar("T")


class SequenceRouter:
    """Finds the replicas of sequences, and sends the sequences' requests to them."""

    def __init__(
        self,
        core: Sender,
        dispatcher: Dispatcher,
        fleet: Callable[[str], ReplicaFleet],
        places: SequencePlaces | None,
    ) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._places = places
        self._lines: dict[str, Line] = {}
        self._remembered: OrderedDict[str, Place] = OrderedDict()
        self._dead: dict[str, float] = {}
        self._sending: dict[bytes, asyncio.Task[None]] = {}
        self._tasks = TaskSet()
        self._stopping, self._away_until = False, 0.0
        self._watch = ReplicaWatch(lambda: dispatcher.out, self._on_silent)
        self._open = OpenRequests()
        self._losing = False

    async def stop(self) -> None:
        """Stop watching replicas, and end the background tasks."""
        self._stopping = True
        await self._watch.stop()
        await self._tasks.end()
        if self._places is not None:
            await self._places.close()

    def abandon(self, id_: bytes) -> None:
        """Forget a request whose caller disconnected. The worker may still run the request."""
        task = self._sending.pop(id_, None)
        if task is not None:
            task.cancel()
        if (request := self._open.get(id_)) is not None:
            self._ended(request)
            gone = DeadlinePassed("the caller closed the connection")
            self._tasks.start(self._record(request, gone), "record a sequence")

    # --- send ------------------------------------------------------------------------------------------

    def begin(
        self,
        endpoint: EndpointRoute,
        version: str,
        route: DeploymentRoute,
        request: Decoded,
        decode: Callable[[Contract], Decoded],
        timeout_ms: float,
        flow: FlowKey,
        trace: bytes,
        decode_s: float,
        done: Callable[[Any], None],
    ) -> bytes:
        """Send a request when its turn comes, and return its id immediately.

        ``done`` is called later with the result or an error. ``decode`` decodes the body again if the
        sequence is at another Deployment, because that Deployment may have another signature.
        """
        ends_at, id_ = time.monotonic() + timeout_ms / 1e3, self._dispatcher.new_id()
        sequenced = SequenceRequest(
            id_, endpoint, version, route, request, decode, ends_at, flow, trace, decode_s
        )
        self._begin_sending(sequenced, done)
        return id_

    def _begin_sending(self, request: SequenceRequest, done: Callable[[Any], None]) -> None:
        id_, turn = request.id, Turn(self._lines, request.key)
        task = self._tasks.start(self._send(request, turn, done), "send to a sequence")
        self._sending[id_] = task

        def end(_: asyncio.Task[None]) -> None:
            turn.end()
            self._sending.pop(id_, None)

        task.add_done_callback(end)

    async def _send(self, request: SequenceRequest, turn: Turn, done: Callable[[Any], None]) -> None:
        try:
            await turn.take()
            place = await self._find_place(request)
            await self._watch.declare(_queue_of(place))
            self._begin(request, place, turn)
            self._core.send(
                request.endpoint,
                request.route,
                request.request,
                request.left_ms,
                request.decode_s,
                request.trace,
                partial(self._on_outcome, request, done),
                request.flow,
                id_=request.id,
                keeper=place.replica,
            )
            request.forget_data()
            await self._uploaded(request.id)
        except TidegateError as error:
            self._forget(request)
            error.deployment = request.route.name
            done(error)
        except asyncio.CancelledError:
            if self._stopping:
                done(Unavailable("the gateway is stopping"))
            raise
        except Exception:
            log.exception("a request of a sequence was not sent")
            self._forget(request)
            done(TidegateError("internal error; see the log of the service"))
        finally:
            turn.release()

    def stream(
        self,
        endpoint: EndpointRoute,
        version: str,
        route: DeploymentRoute,
        request: Decoded,
        decode: Callable[[Contract], Decoded],
        timeout_ms: float,
        flow: FlowKey,
        trace: bytes,
        decode_s: float,
        queued: Callable[[], None],
    ) -> AsyncGenerator[Any]:
        """Yield the answers to a request of a sequence. Closing the generator cancels the request."""
        ends_at, id_ = time.monotonic() + timeout_ms / 1e3, self._dispatcher.new_id()
        given = (id_, endpoint, version, route, request, decode, ends_at, flow, trace, decode_s)
        return self._stream(SequenceRequest(*given), queued)

    async def _stream(self, request: SequenceRequest, queued: Callable[[], None]) -> AsyncGenerator[Any]:
        turn, outcome = Turn(self._lines, request.key), None

        def sent() -> None:
            request.forget_data()
            queued()
            if self._dispatcher.uploads(request.id):
                self._tasks.start(release_later(), "end the turn of a sequence's request")
            else:
                turn.release()

        async def release_later() -> None:
            await self._uploaded(request.id)
            turn.release()

        try:
            await turn.take()
            place = await self._find_place(request)
            await self._watch.declare(_queue_of(place))
            self._begin(request, place, turn)
            answers = self._core.stream_from(
                request.route,
                request.request,
                request.left_ms,
                request.decode_s,
                request.trace,
                sent,
                flow=request.flow,
                admitted=True,
                id_=request.id,
                keeper=place.replica,
            )
            async with aclosing(answers):
                async for answer in answers:
                    yield answer
        except TidegateError as error:
            outcome = error
            error.deployment = request.route.name
            if isinstance(error, SequenceLost):
                self._lose_others(request, error)
            raise
        finally:
            turn.end()
            if request.place is not None:
                self._ended(request)
                self._tasks.start(self._record(request, outcome), "record a sequence")

    async def _uploaded(self, id_: bytes) -> None:
        """Wait while a request's data is uploaded. A later request of its sequence must not overtake it."""
        while self._dispatcher.uploads(id_):
            await asyncio.sleep(UPLOAD_POLL_S)

    def _begin(self, request: SequenceRequest, place: Place, turn: Turn) -> None:
        if turn.lost(place):
            raise self._lost(request, "an earlier request of it was lost")
        request.place = place
        self._open.add(request)
        self._watch.begin(_queue_of(place), request.id)

    def _forget(self, request: SequenceRequest) -> None:
        """Stop watching a request that could not be sent."""
        if self._open.get(request.id) is request:
            self._ended(request)

    def _ended(self, request: SequenceRequest) -> None:
        place = request.place
        assert place is not None
        self._watch.end(_queue_of(place), request.id)
        self._open.remove(request)

    def _on_outcome(self, request: SequenceRequest, done: Callable[[Any], None], outcome: Any) -> None:
        self._ended(request)
        if isinstance(outcome, SequenceLost):
            if self._starts_again(request):
                request.id = self._dispatcher.new_id()
                self._begin_sending(request, done)
                return
            self._lose_others(request, outcome)
        if not request.mark.end:
            done(outcome)
            self._tasks.start(self._record(request, outcome), "record a sequence")
            return
        # Record the end first, so that the slot is free when the caller gets the answer.
        recording = self._tasks.start(self._record(request, outcome), "record a sequence")
        recording.add_done_callback(lambda _: done(outcome))

    def _starts_again(self, request: SequenceRequest) -> bool:
        """Return True if another replica can start a lost sequence, because it has no state yet.

        Return False if this gateway has another request of the sequence already. The new state would lack
        that request.
        """
        line = self._lines.get(request.key)
        waiting = 0 if line is None else line.users - (request.id in self._sending)
        return (
            request.mark.start
            and request.route.retry_safe
            and request.starts < STARTS
            and request.left_ms > 1.0
            and not request.followed
            and not waiting
        )

    def _lose_others(self, request: SequenceRequest, error: SequenceLost) -> None:
        """Fail the later requests of a lost sequence, because their state lacks ``request``."""
        if self._losing or request.place is None:  # `_losing`: this call comes from the loop below
            return
        if (line := self._lines.get(request.key)) is not None:
            line.lost = request.place
        if self._remembered.get(request.key) in (None, request.place):
            self._remember(request.key, request.place._replace(lost=True))
        self._losing = True
        try:
            for id_ in self._open.after(request):
                self._dispatcher.fail(id_, SequenceLost(error.message))
        finally:
            self._losing = False

    def _on_silent(self, id_: bytes) -> None:
        request = self._open.get(id_)
        if request is None or request.place is None:
            return
        replica = request.place.replica
        now = time.monotonic()
        self._dead = {name: until for name, until in self._dead.items() if until > now}
        self._dead[replica] = now + DEAD_S
        self._dispatcher.fail(id_, self._lost(request, f"the replica {replica} has ended"))

    def _lost(self, request: SequenceRequest, why: str) -> SequenceLost:
        return lost(request.mark, request.endpoint.name, why)

    # --- places ----------------------------------------------------------------------------------------

    async def _find_place(self, request: SequenceRequest) -> Place:
        held = await self._held(request)
        if request.mark.start:
            return await self._start(request, held)
        if held is None:
            SEQUENCES.labels("unknown").inc()
            raise not_started(request.mark, request.endpoint.name)
        if held.lost:
            raise self._lost(request, f"the replica {held.replica} has ended")
        if not self._lives(held.replica):
            if await self._watch.has_ended(_queue_of(held)):
                await self._record_end(request.key, held, lost=True)
                raise self._lost(request, f"the replica {held.replica} has ended")
            self._dead.pop(held.replica, None)  # the replica still runs: only its connection was lost
        if held.deployment != request.route.name:
            self._move(request, held)
        if not await self._keep(request, held, request.left_ms) and await self._held(request) != held:
            return await self._find_place(request)  # meanwhile, a loss or another start was recorded
        return held

    async def _held(self, request: SequenceRequest) -> Place | None:
        """Return the replica of a sequence, or None if the sequence is unknown.

        Ask the store first. If the store is down or has lost its data, return the replica that this gateway
        remembers. If the remembered replica is wrong, the worker refuses the request. Raise Unavailable if
        the store is down and this gateway remembers no replica.
        """
        try:
            found = await self._asked(lambda places: places.find(request.key))
        except StoreUnavailable:
            known = self._remembered.get(request.key)
            if known is None or known.lost:
                raise sequences.store_away(request.endpoint.name, request.mark, AWAY_S) from None
            return known
        known = self._remembered.get(request.key)
        if found is None or known == found._replace(lost=True):  # the loss may not be recorded yet
            return known
        if not found.lost:
            self._remember(request.key, found)
        return found

    async def _asked(self, call: Callable[[SequencePlaces], Awaitable[T]]) -> T:
        """Call the store; raise StoreUnavailable if it is down.

        For ``AWAY_S`` seconds after a failure, do not call the store. Raise StoreUnavailable immediately.
        """
        if self._places is None or time.monotonic() < self._away_until:
            raise StoreUnavailable("the store does not answer")
        try:
            return await call(self._places)
        except StoreUnavailable:
            self._away_until = time.monotonic() + AWAY_S
            raise

    def _remember(self, key: str, place: Place) -> None:
        self._remembered[key] = place
        self._remembered.move_to_end(key)
        if len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)

    def _move(self, request: SequenceRequest, held: Place) -> None:
        """Change a request's Deployment to the Deployment of its sequence.

        The sequence's Deployment may serve an older version. If this Deployment was removed, raise
        SequenceLost.
        """
        route = request.endpoint.route_named(held.deployment)
        if route is None:
            raise self._lost(request, f"the Deployment {held.deployment} was removed")
        request.route, request.request = route, request.decode(route.contract)

    async def _start(self, request: SequenceRequest, held: Place | None) -> Place:
        """Wait for a ready replica with a free slot for a new sequence, and return the replica.

        If no slot becomes free in time (see ``WAIT_S``), raise Overloaded. If no replica is ready before the
        deadline, raise DeadlinePassed. If the store is down, raise Unavailable.
        """
        request.starts += 1
        name, began = request.route.name, time.monotonic()
        if held is not None and held.deployment != name:
            await self._record_end(request.key, held)
        waits_until = min(began + WAIT_S, began + request.left_ms / 1e3 * WAIT_SHARE)
        load = self._dispatcher.queue_of(request.route).load
        load.outstanding += 1  # so that the autoscaler counts the waiting sequence
        try:
            while True:
                fleet = self._fleet(name)
                ready = [each for each in fleet.sequences if self._lives(each.name)]
                if ready and (place := await self._choose(request, ready)) is not None:
                    SEQUENCES.labels("started").inc()
                    return place
                if ready and time.monotonic() > waits_until:
                    SEQUENCES.labels("full").inc()
                    slots = sum(each.slots for each in ready)
                    raise sequences.all_taken(request.endpoint.name, len(ready), slots, request.idle_ms)
                if time.monotonic() > request.ends_at:
                    raise DeadlinePassed(f"no replica of {name} was ready before the deadline")
                if not ready:
                    self._dispatcher.demand(request.route)
                await asyncio.sleep(POLL_S)
        finally:
            load.outstanding -= 1

    def _lives(self, replica: str) -> bool:
        return self._dead.get(replica, 0.0) < time.monotonic()

    async def _choose(self, request: SequenceRequest, ready: list[SequenceSlots]) -> Place | None:
        """Return the replica that the store has chosen; None if all slots are taken.

        Raise Unavailable if the store is down. Without the store, other gateways cannot find the new
        sequence.
        """
        token, name = os.urandom(6).hex(), request.route.name
        times = request.times(request.left_ms)
        try:
            place = await self._asked(
                lambda places: places.start(request.key, name, ready, token, request.id, times)
            )
        except StoreUnavailable:
            raise sequences.store_away(request.endpoint.name, request.mark, AWAY_S) from None
        if place is not None:
            self._remember(request.key, place)
        return place

    # --- records ---------------------------------------------------------------------------------------

    async def _record(self, request: SequenceRequest, outcome: Any) -> None:
        """Record in the store that a sequence has ended, is lost, or continues."""
        place = request.place
        assert place is not None
        if isinstance(outcome, SequenceLost):
            await self._record_end(request.key, place, lost=True)
        elif isinstance(outcome, BadRequest):
            # In these two cases, the model server has no such sequence.
            if request.mark.start or START_FLAG in outcome.message:
                await self._record_end(request.key, place)
        elif request.mark.end and not isinstance(outcome, TidegateError):
            SEQUENCES.labels("ended").inc()
            await self._record_end(request.key, place)
        else:
            await self._keep(request, place, 0.0)

    async def _record_end(self, key: str, place: Place, *, lost: bool = False) -> None:
        if self._remembered.get(key) == place:
            del self._remembered[key]
        try:
            first = await self._asked(lambda places: places.end(key, place, lost=lost))
        except StoreUnavailable:
            log.info("the end of a sequence was not recorded; the sequence expires when it is idle")
            return
        if self._remembered.get(key) == place._replace(lost=True):
            del self._remembered[key]  # the store knows it now
        if lost and first:
            SEQUENCES.labels("lost").inc()

    async def _keep(self, request: SequenceRequest, place: Place, busy_ms: float) -> bool:
        """Record that a request begins or has ended. Return False if the sequence has left ``place``."""
        try:
            times = request.times(busy_ms)
            return await self._asked(lambda places: places.keep(request.key, place, request.id, times))
        except StoreUnavailable:
            log.debug("the store does not answer; the gateway keeps the sequence in memory")
            return True


def _queue_of(place: Place) -> Queue:
    return sequences_queue(place.deployment, place.replica)

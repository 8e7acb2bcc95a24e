"""Run a request from HTTP or gRPC: choose a Deployment, check, admit and queue it, wait for the answer."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.adapters.heartbeat import Heartbeat
from services.gateway.adapters.pending_requests import ReplyOrError
from services.gateway.adapters.route_table import RouteTableCache
from services.gateway.adapters.store.sequences import SequencePlaces
from services.gateway.application.feedback import FeedbackTags
from services.gateway.application.inference.chunk_buffer import ChunkBuffer
from services.gateway.application.inference.failover import Failover, elsewhere
from services.gateway.application.inference.sequences import SequenceRouter
from services.gateway.application.inference.shadow_traffic import ShadowTraffic
from services.gateway.domain import admission
from services.gateway.domain.contract import Contract, Decoded, inputs_unknown
from services.gateway.domain.fair_lane import NO_CALLER, FlowKey
from services.gateway.domain.feedback_ids import FeedbackIds
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.request_costs import RequestCosts
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute, RouteTable, require
from services.gateway.domain.traffic_split import Origin, TrafficSplitter
from tidegate.kernel.errors import (
    BY_REASON,
    BadRequest,
    ColdStart,
    DeadlinePassed,
    ModelFailed,
    NoCapacity,
    TidegateError,
    Unavailable,
    UpstreamUnavailable,
    WorkerLost,
)
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.access import ANONYMOUS, Principal
from tidegate.kernel.protocol.envelope import Reply, Tensor
from tidegate.kernel.protocol.presence import GatewayLoad

MAX_TIMEOUT_MS = 86_400_000


@dataclass(slots=True)
class Timing:
    """The parts of a request's time in seconds.

    Each part begins and ends in the same process, so the clocks of different hosts need not agree.
    """

    decode: float = 0.0
    wait: float = 0.0
    compute: float = 0.0
    encode: float = 0.0

    def transit(self, total: float) -> float:
        """Return the time in queues, sockets and event loops: ``total`` minus the measured parts."""
        rest = total - self.decode - self.wait - self.compute - self.encode
        return rest if rest > 0.0 else 0.0


@dataclass(slots=True)
class InferenceResult:
    """A model's answer, the request that it belongs to, and its timing."""

    route: DeploymentRoute
    request: Decoded
    rows: int
    outputs: tuple[Tensor, ...]
    parameters: dict[str, Any]
    reply: Reply
    timing: Timing


def _nothing() -> None:
    """Do nothing. This function is the default of the parameter ``queued`` of several methods."""


class InferenceCore:
    """Runs inference requests from HTTP and gRPC. ``feedback`` makes the ids for callers' feedback."""

    def __init__(
        self,
        routes: RouteTableCache,
        dispatcher: Dispatcher,
        heartbeat: Heartbeat,
        feedback: FeedbackTags | None = None,
        shadows: ShadowTraffic | None = None,
        costs: RequestCosts | None = None,
        places: SequencePlaces | None = None,
    ) -> None:
        self.sequences = SequenceRouter(self, dispatcher, self.fleet, places)
        self._costs = costs or RequestCosts()
        self.feedback = feedback or FeedbackTags(FeedbackIds(""))
        self._shadows = shadows
        self._routes = routes
        self._dispatcher = dispatcher
        self._heartbeat = heartbeat
        self._splitter = TrafficSplitter()

    def table(self) -> RouteTable:
        """Return the route table; raise NoRoutes before the first one was received."""
        return require(self._routes.table)

    def fleet(self, deployment: str) -> ReplicaFleet:
        """Return the last known state of a Deployment's replicas."""
        return self._heartbeat.fleet(deployment)

    def load(self, route: DeploymentRoute) -> GatewayLoad:
        """Return this gateway's counters of a Deployment's requests."""
        return self._dispatcher.queue_of(route).load

    def abandon(self, id_: bytes) -> None:
        """Forget a request whose caller disconnected, and cancel it at the worker."""
        self.sequences.abandon(id_)
        self._dispatcher.abandon(id_)

    def wake(self, route: DeploymentRoute) -> None:
        """Request a replica if the Deployment has no ready one."""
        if self._heartbeat.fleet(route.name).ready == 0:
            self._dispatcher.demand(route)

    def find(self, model: str, version: str) -> tuple[EndpointRoute, DeploymentRoute]:
        """Return an endpoint and one of its Deployments. Raise NotFound or NoRoutes.

        This method is for code that sends no request. Unlike :meth:`pick`, it does not count towards the
        traffic shares.
        """
        return require(self._routes.table).find(model, version)

    def pick(
        self, model: str, version: str, origin: Callable[[], Origin] | None = None
    ) -> tuple[EndpointRoute, DeploymentRoute]:
        """Return the endpoint and the Deployment for a request. Raise NotFound or NoRoutes.

        The calling code must call this method once for each request, because each call counts towards the
        traffic shares. ``origin`` returns the facts that the endpoint's rules and sticky keys read.
        """
        endpoint, route = require(self._routes.table).pick(model, version, self._splitter, origin)
        if endpoint.reserves and not version:
            return endpoint, self._reserved(route, endpoint.reserves.get(route.name))
        return endpoint, route

    def _reserved(self, shared: DeploymentRoute, own: DeploymentRoute | None) -> DeploymentRoute:
        """Return the Deployment that gets a request: ``own`` or ``shared``.

        ``own``: the Deployment with the reserved replicas, or None. It gets the request if one of its
        replicas is ready, and if it can take another request now or no replica of ``shared`` is ready.
        """
        if own is None or not self.fleet(own.name).ready:
            return shared
        queue = self._dispatcher.queue_of(own)
        free = queue.load.outstanding < queue.lane.window
        return own if free or not self.fleet(shared.name).ready else shared

    def begin(
        self,
        model: str,
        version: str,
        timeout_ms: float | None,
        decode: Callable[[Contract], Decoded],
        trace: bytes,
        done: Callable[[InferenceResult | TidegateError], None],
        origin: Callable[[], Origin] | None = None,
        caller: Principal = ANONYMOUS,
    ) -> bytes:
        """Queue one request and return its id. Raise a TidegateError if it is refused.

        ``decode`` turns the request's body into tensors and checks them. ``timeout_ms``: None means the
        endpoint's default. ``done`` is called later, exactly once, with the result or an error.
        """
        endpoint, route, request, timeout_ms, decode_s, flow = self._prepare(
            model, version, timeout_ms, decode, origin, caller
        )
        if route.decoupled:
            if route.llm is not None:
                raise not_tensors(model)
            raise BadRequest(
                f"model {model!r} is decoupled (it returns any number of answers to a request): "
                "use /generate_stream, or ModelStreamInfer over gRPC"
            )
        if request.sequence is not None and self._keeps_sequences(endpoint, route):
            if request.sequence.start:  # later requests need no admission: their replica is already chosen
                self.admit(route, timeout_ms, flow)
            return self.sequences.begin(
                endpoint, version, route, request, decode, timeout_ms, flow, trace, decode_s, done
            )
        try:
            self.admit(route, timeout_ms, flow)
        except (NoCapacity, ColdStart) as error:
            if version:
                raise
            route = elsewhere(endpoint, route, {route.name}, error, origin)
            self.admit(route, timeout_ms, flow)
        if endpoint.shadow is not None and self._shadows is not None and not version:
            done = self._shadows.watch(endpoint, route, request, trace, timeout_ms, done)
        if route.upstream and not version:
            ends_at = time.monotonic() + timeout_ms / 1e3
            done = Failover(self, endpoint, route, request, trace, ends_at, flow, origin, done).on_outcome
        return self.send(endpoint, route, request, timeout_ms, decode_s, trace, done, flow)

    def send(
        self,
        endpoint: EndpointRoute,
        route: DeploymentRoute,
        request: Decoded,
        timeout_ms: float,
        decode_s: float,
        trace: bytes,
        done: Callable[[InferenceResult | TidegateError], None],
        flow: FlowKey,
        *,
        id_: bytes = b"",
        keeper: str = "",
    ) -> bytes:
        """Queue an admitted request, and return its id.

        ``done`` is called later, exactly once, with the result or an error. ``keeper``: the replica that has
        the state of the request's sequence; empty if the request belongs to no sequence.
        """
        # The callback lives until the reply arrives, so it must not keep the request's tensors in memory.
        kept = request.without_data()

        def on_outcome(outcome: ReplyOrError) -> None:
            result = (
                outcome if isinstance(outcome, TidegateError) else _result(route, kept, decode_s, outcome)
            )
            if isinstance(result, TidegateError):
                result.deployment = route.name
                if timeout_ms < endpoint.timeout_ms and isinstance(result, DeadlinePassed):
                    result.cut_after_s = timeout_ms / 1e3
            done(result)

        return self._dispatcher.send(
            route,
            request.rows,
            request.key,
            request.data,
            timeout_ms / 1e3,
            trace[:255],
            on_outcome,
            priority=request.priority,
            caller=flow,
            id_=id_,
            keeper=keeper,
        )

    async def infer(
        self,
        model: str,
        version: str,
        timeout_ms: float | None,
        decode: Callable[[Contract], Decoded],
        trace: bytes = b"",
        queued: Callable[[], None] = _nothing,
        origin: Callable[[], Origin] | None = None,
        caller: Principal = ANONYMOUS,
    ) -> InferenceResult:
        """Run one request and return its result; raise a TidegateError if it is refused or fails.

        ``queued`` is called when the request is in the queue. Cancelling this coroutine cancels the request.
        """
        future: asyncio.Future[InferenceResult | TidegateError] = asyncio.get_running_loop().create_future()

        def done(outcome: InferenceResult | TidegateError) -> None:
            if not future.done():
                future.set_result(outcome)

        id_ = self.begin(model, version, timeout_ms, decode, trace, done, origin, caller)
        queued()
        try:
            outcome = await future
        except asyncio.CancelledError:
            self.abandon(id_)
            raise
        if isinstance(outcome, TidegateError):
            raise outcome
        return outcome

    async def stream(
        self,
        model: str,
        version: str,
        timeout_ms: float | None,
        decode: Callable[[Contract], Decoded],
        trace: bytes = b"",
        queued: Callable[[], None] = _nothing,
        origin: Callable[[], Origin] | None = None,
        caller: Principal = ANONYMOUS,
    ) -> AsyncGenerator[InferenceResult]:
        """Yield the answers to one request as the model makes them.

        ``timeout_ms`` limits the time to the first answer, and the time between two answers. Raise a
        TidegateError if the request is refused or fails. ``queued`` is called when the request is in the
        queue. Closing the generator cancels the request.
        """
        endpoint, route, request, timeout_ms, decode_s, flow = self._prepare(
            model, version, timeout_ms, decode, origin, caller
        )
        if route.llm is not None:
            raise not_tensors(model)
        if request.sequence is not None and self._keeps_sequences(endpoint, route):
            if request.sequence.start:  # later requests need no admission: their replica is already chosen
                self.admit(route, timeout_ms, flow)
            answers = self.sequences.stream(
                endpoint, version, route, request, decode, timeout_ms, flow, trace, decode_s, queued
            )
        else:
            answers = self.stream_from(route, request, timeout_ms, decode_s, trace, queued, flow=flow)
        del request
        async with aclosing(answers):
            async for answer in answers:
                yield answer

    async def stream_from(
        self,
        route: DeploymentRoute,
        request: Decoded,
        timeout_ms: float,
        decode_s: float,
        trace: bytes = b"",
        queued: Callable[[], None] = _nothing,
        *,
        flow: FlowKey = NO_CALLER,
        cost: float = 0.0,
        admitted: bool = False,
        replica: str | None = None,
        wait_ms: float = 0.0,
        id_: bytes = b"",
        keeper: str = "",
    ) -> AsyncGenerator[InferenceResult]:
        """Yield the answers of a Deployment to a decoded request, as :meth:`stream` does.

        ``decode_s``: the seconds that decoding took. ``admitted``: True if the request was admitted before.
        ``flow``: the flow of the request's caller at the endpoint. ``cost``: the amount that the flow is
        charged for this request; 0 means the number of the request's rows.

        ``replica``: the replica that a request to a language model prefers. The request waits for this
        replica for up to ``wait_ms`` milliseconds. ``keeper``: the replica that has the state of the
        request's sequence.
        """
        if not admitted:
            self.admit(route, timeout_ms, flow)
        kept = request.without_data()
        chunks = ChunkBuffer(lambda: self._dispatcher.abandon(id_))
        id_ = self._dispatcher.send(
            route,
            request.rows,
            request.key,
            request.data,
            timeout_ms / 1e3,
            trace[:255],
            chunks.put,
            priority=request.priority,
            stream=True,
            replica=replica or "",
            wait_ms=wait_ms,
            caller=flow,
            cost=cost,
            id_=id_,
            keeper=keeper,
        )
        del request
        queued()
        try:
            async for reply in chunks.read():
                result = _result(route, kept, decode_s, reply)
                if isinstance(result, TidegateError):
                    raise result
                yield result
        except TidegateError as error:
            error.deployment = route.name
            raise
        finally:
            self._dispatcher.abandon(id_)

    def _prepare(
        self,
        model: str,
        version: str,
        timeout_ms: float | None,
        decode: Callable[[Contract], Decoded],
        origin: Callable[[], Origin] | None,
        caller: Principal,
    ) -> tuple[EndpointRoute, DeploymentRoute, Decoded, float, float, FlowKey]:
        """Return the endpoint, the Deployment, the decoded request, two times, and the caller's flow.

        The times are the timeout in milliseconds, and the seconds that decoding took.
        """
        started = time.perf_counter()
        endpoint, route = self.pick(model, version, origin)
        if timeout_ms is None:
            timeout_ms = endpoint.timeout_ms
        try:
            request = decode(route.contract)
        except BadRequest as error:
            error.deployment = route.name
            raise
        except Unavailable as error:
            raise self.needs_replica(route, error) from None
        if request.timeout_ms is not None:
            timeout_ms = min(timeout_ms, request.timeout_ms)
        flow = endpoint.flow_of(caller)
        return endpoint, route, request, timeout_ms, time.perf_counter() - started, flow

    def _keeps_sequences(self, endpoint: EndpointRoute, route: DeploymentRoute) -> bool:
        """Return True if the endpoint's model is stateful. Raise an error if its signature is unknown."""
        if route.contract.signature is None:
            raise self.needs_replica(route, inputs_unknown())
        return endpoint.stateful

    def needs_replica(self, route: DeploymentRoute, error: Unavailable) -> TidegateError:
        """Request a replica, because a call needs data that only a replica has. Return the error to raise.

        The result is ``error``, or the reason why no replica can start.
        """
        self._dispatcher.demand(route)
        fleet = self._heartbeat.fleet(route.name)
        if fleet.ready:
            return error
        return admission.no_replica_in_time(route.wakeable, fleet, math.inf, route.name) or error

    def admit(self, route: DeploymentRoute, timeout_ms: float, flow: FlowKey) -> None:
        """Raise Overloaded, NoCapacity, ColdStart or another error if a request may not be queued."""
        if self._costs.refused:
            self._costs.check_budget(route.name, time.time())
        queue = self._dispatcher.queue_of(route)
        load = queue.load
        refusal = admission.refusal(
            outstanding=load.outstanding,
            max_queue=route.max_queue,
            wakeable=route.wakeable,
            fleet=self._heartbeat.fleet(route.name),
            timeout_ms=timeout_ms,
            name=route.name,
            standing=queue.standing(flow),
        )
        if refusal is not None:
            load.refused += 1
            refusal.deployment = route.name
            self._dispatcher.demand(route)
            raise refusal


def _result(
    route: DeploymentRoute, request: Decoded, decode_s: float, reply: Reply
) -> InferenceResult | TidegateError:
    if reply.status == envelope.FAILED:
        return failure(reply)
    try:
        outputs, parameters = envelope.read_result_key(reply.key)
    except envelope.Undecodable as error:
        return Unavailable(f"the gateway cannot read the worker's answer: {error}")
    timing = Timing(decode_s, reply.wait_us / 1e6, reply.compute_us / 1e6)
    return InferenceResult(route, request, reply.rows, outputs, parameters, reply, timing)


def not_tensors(model: str) -> BadRequest:
    """Return the error for a request with tensors to a language model.

    Such a request must be refused: its tensors could name any URL path of the engine.
    """
    return BadRequest(
        f"model {model!r} is a language model and accepts no tensors: use /v1/chat/completions",
        reason="language_model",
    )


def failure(reply: Reply) -> TidegateError:
    """Return the error that a failed reply contains."""
    body = orjson.loads(reply.key)
    if body["reason"] == WorkerLost.reason:  # BY_REASON does not contain WorkerLost
        return WorkerLost(body["message"])
    if body["reason"] == UpstreamUnavailable.reason:
        return UpstreamUnavailable(body["message"])
    return BY_REASON.get(body["reason"], ModelFailed)(body["message"], reason=body["reason"])


def parse_timeout(header: bytes | None) -> float | None:
    """Return the value of ``X-Request-Timeout-Ms``; None without it. Raise BadRequest if it is invalid."""
    if header is None:
        return None
    try:
        value = float(header)
    except ValueError:
        value = -1.0
    if not 1 <= value <= MAX_TIMEOUT_MS:
        raise BadRequest(
            f"X-Request-Timeout-Ms must be 1..{MAX_TIMEOUT_MS} milliseconds, got {header.decode('latin-1')!r}"
        )
    return value

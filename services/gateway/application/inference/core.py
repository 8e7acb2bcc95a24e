"""One request, whatever door it came through: pick, check, admit, queue, wait."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

import orjson

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.adapters.heartbeat import Heartbeat
from services.gateway.adapters.pending_requests import ReplyOrError
from services.gateway.adapters.route_table import RouteTableCache
from services.gateway.application.inference.chunk_buffer import ChunkBuffer
from services.gateway.domain import admission
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute, RouteTable, require
from tidegate.kernel.errors import BY_REASON, BadRequest, ModelFailed, TidegateError, Unavailable
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import Reply, Tensor

MAX_TIMEOUT_MS = 86_400_000


@dataclass(slots=True)
class Timing:
    """Parts of a request's time in seconds, each from one clock; ``transit`` is what remains."""

    decode: float = 0.0
    wait: float = 0.0
    compute: float = 0.0
    encode: float = 0.0

    def transit(self, total: float) -> float:
        """Queues, sockets and event loops: the total less the measured parts, never negative."""
        return max(0.0, total - self.decode - self.wait - self.compute - self.encode)


@dataclass(slots=True)
class InferenceResult:
    """A model's answer, and where it came from."""

    route: DeploymentRoute
    request: Decoded
    rows: int
    outputs: tuple[Tensor, ...]
    parameters: dict[str, Any]
    reply: Reply
    timing: Timing


def _nothing() -> None:
    """What nobody wants to hear."""


class InferenceCore:
    """The gateway's one way of a request."""

    def __init__(self, routes: RouteTableCache, dispatcher: Dispatcher, heartbeat: Heartbeat) -> None:
        self._routes = routes
        self._dispatcher = dispatcher
        self._heartbeat = heartbeat

    def table(self) -> RouteTable:
        """Return the route table; raise NoRoutes if there is none yet."""
        return require(self._routes.table)

    def fleet(self, deployment: str) -> ReplicaFleet:
        """Return what is known of a Deployment's replicas."""
        return self._heartbeat.fleet(deployment)

    def abandon(self, id_: bytes) -> None:
        """Forget a request whose caller has gone, and cancel it at the worker."""
        self._dispatcher.abandon(id_)

    def wake(self, route: DeploymentRoute) -> None:
        """Ask for a replica if the Deployment has none ready."""
        if self._heartbeat.fleet(route.name).ready == 0:
            self._dispatcher.demand(route)

    def pick(self, model: str, version: str) -> tuple[EndpointRoute, DeploymentRoute]:
        """The Deployment for a request to ``model``; raises NotFound or NoRoutes."""
        return require(self._routes.table).pick(model, version, random.random())

    def begin(
        self,
        model: str,
        version: str,
        timeout_ms: float | None,
        decode: Callable[[Contract], Decoded],
        trace: bytes,
        done: Callable[[InferenceResult | TidegateError], None],
    ) -> bytes:
        """Queue one request and give its id; ``decode`` turns its body into tensors against a contract.

        ``timeout_ms`` None is the endpoint's default. Raises a TidegateError when the request is refused
        at once; otherwise ``done`` is called, once and later, with the answer or with what went wrong.
        """
        route, request, timeout_ms, decode_s = self._prepare(model, version, timeout_ms, decode)
        if route.decoupled:
            raise BadRequest(
                f"model {model!r} is decoupled (any number of answers to a request): "
                "use /generate_stream, or ModelStreamInfer over gRPC"
            )
        self._admit(route, timeout_ms)

        # What waits for the answer must not keep the request's tensors.
        kept = request._replace(data=[])

        def on_outcome(outcome: ReplyOrError) -> None:
            found = outcome if isinstance(outcome, TidegateError) else _answer(route, kept, decode_s, outcome)
            if isinstance(found, TidegateError):
                found.deployment = route.name
            done(found)

        return self._dispatcher.send(
            route,
            request.rows,
            request.key,
            request.data,
            timeout_ms / 1e3,
            trace[:255],
            on_outcome,
            priority=request.priority,
        )

    async def infer(
        self,
        model: str,
        version: str,
        timeout_ms: float | None,
        decode: Callable[[Contract], Decoded],
        trace: bytes = b"",
        queued: Callable[[], None] = _nothing,
    ) -> InferenceResult:
        """:meth:`begin` for who can wait: the answer, or the TidegateError raised. Cancelling abandons it.

        ``queued`` is called when it was not refused.
        """
        future: asyncio.Future[InferenceResult | TidegateError] = asyncio.get_running_loop().create_future()

        def done(outcome: InferenceResult | TidegateError) -> None:
            if not future.done():
                future.set_result(outcome)

        id_ = self.begin(model, version, timeout_ms, decode, trace, done)
        queued()
        try:
            outcome = await future
        except asyncio.CancelledError:
            self._dispatcher.abandon(id_)
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
    ) -> AsyncGenerator[InferenceResult]:
        """Many answers to one request, each as it is made; of a model that gives one, just that.

        ``timeout_ms`` is the time until the first and between two. Raises a TidegateError when the request is
        refused, or fails at any point; ``queued`` is called when it was not refused. Closing the generator
        early cancels the request.
        """
        route, request, timeout_ms, decode_s = self._prepare(model, version, timeout_ms, decode)
        self._admit(route, timeout_ms)
        kept = request._replace(data=[])
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
        )
        del request
        queued()
        try:
            async for reply in chunks.read():
                answer = _answer(route, kept, decode_s, reply)
                if isinstance(answer, TidegateError):
                    raise answer
                yield answer
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
    ) -> tuple[DeploymentRoute, Decoded, float, float]:
        """Its Deployment, the request, its time in ms, and how long that took in seconds."""
        started = time.perf_counter()
        endpoint, route = self.pick(model, version)
        if timeout_ms is None:
            timeout_ms = endpoint.timeout_ms
        try:
            request = decode(route.contract)
        except BadRequest as error:
            error.deployment = route.name
            raise
        except Unavailable as error:
            raise self.for_want_of_replica(route, error) from None
        if request.timeout_ms is not None:
            timeout_ms = min(timeout_ms, request.timeout_ms)
        return route, request, timeout_ms, time.perf_counter() - started

    def for_want_of_replica(self, route: DeploymentRoute, error: Unavailable) -> TidegateError:
        """``error``, that only a replica knows, once one is asked for; or why there will be none."""
        self._dispatcher.demand(route)
        fleet = self._heartbeat.fleet(route.name)
        if fleet.ready:
            return error
        return admission.nobody_there(route.wakeable, fleet, math.inf, route.name) or error

    def _admit(self, route: DeploymentRoute, timeout_ms: float) -> None:
        load = self._dispatcher.lane(route).load
        refusal = admission.refusal(
            outstanding=load.outstanding,
            max_queue=route.max_queue,
            wakeable=route.wakeable,
            fleet=self._heartbeat.fleet(route.name),
            timeout_ms=timeout_ms,
            name=route.name,
        )
        if refusal is not None:
            load.refused += 1
            refusal.deployment = route.name
            self._dispatcher.demand(route)
            raise refusal


def _answer(
    route: DeploymentRoute, request: Decoded, decode_s: float, reply: Reply
) -> InferenceResult | TidegateError:
    if reply.status == envelope.FAILED:
        return failure(reply)
    try:
        outputs, parameters = envelope.read_result_key(reply.key)
    except envelope.Undecodable as error:
        return Unavailable(f"the worker's answer cannot be read: {error}")
    timing = Timing(decode_s, reply.wait_us / 1e6, reply.compute_us / 1e6)
    return InferenceResult(route, request, reply.rows, outputs, parameters, reply, timing)


def failure(reply: Reply) -> TidegateError:
    """The error that a failed reply carries."""
    told = orjson.loads(reply.key)
    return BY_REASON.get(told["reason"], ModelFailed)(told["message"], reason=told["reason"])


def parse_timeout(header: bytes | None) -> float | None:
    """``X-Request-Timeout-Ms`` in milliseconds; None when absent. Raises BadRequest."""
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

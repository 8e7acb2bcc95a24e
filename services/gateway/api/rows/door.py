"""Receive, run, count and log the requests with tensors in the format of other model servers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import numpy as np
from fastapi import Request, Response
from starlette.types import Send

from services.gateway.api.body_limits import Body, BodyLimits, Headers
from services.gateway.api.cancellable_response import CancellableResponse
from services.gateway.api.inference.handler import CLIENT_CLOSED
from services.gateway.api.metrics import CALLER_GONE, GatewayMetrics
from services.gateway.api.request_body import receive_body
from services.gateway.api.server_timing import server_timing
from services.gateway.application.access import Access
from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import InferenceCore, InferenceResult, parse_timeout
from services.gateway.domain.contract import Contract, Decoded
from services.gateway.domain.routing import EndpointRoute
from services.gateway.domain.rows import encoding
from services.gateway.domain.traffic_split import Origin
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Forbidden, NotFound, TidegateError
from tidegate.kernel.protocol.access import INFER, Principal, lacks, may_not_use
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.service import caller
from tidegate.kernel.service.error_answers import status_of

log = telemetry.logger(__name__)


class Received(NamedTuple):
    """A request with its whole body. ``started``: when the body was complete (``time.perf_counter``)."""

    body: Buffer
    headers: Headers
    held: Body
    started: float

    def header(self, name: str) -> str:
        """Return the value of a header, or an empty string if the header is missing."""
        return self.headers.get(name.encode(), b"").decode("latin-1")


Make = Callable[[Received], Awaitable[Response]]
Failed = Callable[[TidegateError], Response]


class Answer(NamedTuple):
    """An answer: its outputs by name, and the headers that every API adds."""

    result: InferenceResult
    outputs: dict[str, np.ndarray]
    headers: dict[str, str]


class RowsDoor:
    """The steps that all APIs of this package share: receive a request, run it, and log it."""

    def __init__(
        self,
        core: InferenceCore,
        access: Access,
        limits: BodyLimits,
        metrics: GatewayMetrics,
        log: AccessLog,
    ) -> None:
        self.core = core
        self._access = access
        self._limits = limits
        self._metrics = metrics
        self._log = log

    async def receive(self, request: Request) -> Received:
        """Receive a request; raise a TidegateError if it is refused.

        The calling code must release ``Received.held`` when the request has ended.
        """
        if not principal().may(INFER):
            raise Forbidden(lacks(principal(), (INFER,)))
        body, held, started = await receive_body(request, self._limits)
        return Received(body, dict(request.scope["headers"]), held, started)

    async def respond(self, request: Request, make: Make, failed: Failed) -> Response:
        """Receive a request, and return a response that runs ``make`` when it is sent.

        ``make`` is cancelled if the caller disconnects. ``failed`` returns the response for an error, in the
        format of the API.
        """
        try:
            received = await self.receive(request)
        except TidegateError as error:
            return failed(error)

        async def write(send: Send) -> None:
            try:
                response = await make(received)
            except TidegateError as error:
                response = failed(error)
            except Exception:
                log.exception("unexpected error")
                response = failed(TidegateError("internal error; see the log of the service"))
            head = {"status": response.status_code, "headers": response.raw_headers}
            await send({"type": "http.response.start", **head})
            await send({"type": "http.response.body", "body": response.body})

        return CancellableResponse(write, received.held.release)

    def endpoints(self) -> list[EndpointRoute]:
        """Return the endpoints that accept tensors and that the caller may use, sorted by name."""
        found = self.core.table().endpoints.values()
        return sorted(
            (each for each in found if principal().may(INFER, each.name) and takes_tensors(each)),
            key=lambda each: each.name,
        )

    def endpoint(self, name: str) -> EndpointRoute:
        """Return the endpoint ``name``.

        Raise NotFound if it does not exist, and Forbidden if the caller may not use it.
        """
        found = self.core.table().endpoints.get(name)
        if found is None:
            raise NotFound(f"there is no model {name!r}: GET /v2/models lists all")
        if not principal().may(INFER, name):
            raise Forbidden(may_not_use(principal(), name))
        return found

    def only(self, how: str) -> str:
        """Return the name of the only endpoint that accepts tensors and that the caller may use.

        Raise BadRequest if there are none or several.

        ``how``: the end of the error's message, which tells the caller how to name a model.
        """
        names = [each.name for each in self.endpoints()]
        if len(names) != 1:
            raise BadRequest(f"this path names no model, and you may use {len(names)} models: {how}")
        return names[0]

    async def run(
        self,
        received: Received,
        protocol: str,
        model: str,
        version: str,
        decode: Callable[[Contract], Decoded],
    ) -> Answer:
        """Run a request and return the answer. Raise a TidegateError if the request is refused or fails.

        ``protocol``: the API's name in the log.
        """
        rid = telemetry.request_id.get()
        trace = self._log.begin(rid.encode("latin-1", "replace"), received.headers)
        caller, cost, error = principal(), UsageCost(), None
        grant = None
        try:
            self.endpoint(model)
            grant = self._access.admit(caller, model)
            result = await self.core.infer(
                model,
                version,
                parse_timeout(received.headers.get(b"x-request-timeout-ms")),
                decode,
                trace,
                cost.begin,
                lambda: Origin(received.headers, caller.id, dict),
                caller,
            )
            return self._answer(received, protocol, model, result, cost, trace)
        except TidegateError as failure:
            error = failure
            raise
        except asyncio.CancelledError:
            error = TidegateError("the caller closed the connection", reason=CALLER_GONE)
            raise
        finally:
            if grant is not None:
                grant.streamed(cost, len(received.body))
            if error is not None:
                self._refused(received, protocol, model, error, trace)

    def _answer(
        self,
        received: Received,
        protocol: str,
        model: str,
        result: InferenceResult,
        cost: UsageCost,
        trace: bytes,
    ) -> Answer:
        began = time.perf_counter()
        outputs = encoding.arrays(result.outputs, result.reply.data, result.rows)
        now = time.perf_counter()
        result.timing.encode, total = now - began, now - received.started
        sent = sum(map(len, result.reply.data))
        cost.add(result.reply, result.parameters, sent, result.route)
        self._metrics.answered(model, result.route.name, result.timing, total)
        if self._log.take():
            self._log.answered(
                protocol, model, result, principal(), telemetry.request_id.get(),
                status=200, received=len(received.body), sent=sent, total=total, headers=received.headers,
            )  # fmt: skip
        if self._log.traces is not None:
            self._log.trace_answer(
                trace, received.headers, protocol, model, result, status=200, started=received.started
            )
        return Answer(result, outputs, {"Server-Timing": server_timing(result, total).decode()})

    def _refused(
        self, received: Received, protocol: str, model: str, error: TidegateError, trace: bytes
    ) -> None:
        gone = error.reason == CALLER_GONE
        if gone:
            self._metrics.refused(model, CALLER_GONE)
        else:
            self._metrics.failed(model, error)
        self._log.refused(
            protocol, model, error, principal(), telemetry.request_id.get(),
            status=CLIENT_CLOSED if gone else status_of(error), received=len(received.body),
            started=received.started, headers=received.headers, trace=trace,
        )  # fmt: skip


def takes_tensors(endpoint: EndpointRoute) -> bool:
    """Return True if none of an endpoint's targets is a language model."""
    return all(route.llm is None for route in endpoint.targets)


def principal() -> Principal:
    """Return the caller of the current request."""
    return caller.current.get().principal

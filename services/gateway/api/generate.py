"""Serve ``/generate`` (one answer as JSON) and ``/generate_stream`` (a server-sent event per answer)."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NamedTuple

import orjson
from fastapi import APIRouter, Request, Response
from starlette.types import Send

from services.gateway.api.body_limits import Body, BodyLimits, Headers
from services.gateway.api.cancellable_response import EVENT_STREAM, CancellableResponse
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.api.request_body import receive_body
from services.gateway.api.server_timing import server_timing
from services.gateway.api.stream_observer import StreamObserver
from services.gateway.application.access import Access, Grant
from services.gateway.application.access_log import AccessLog
from services.gateway.application.feedback import HEADER as FEEDBACK_ID
from services.gateway.application.feedback import PendingId
from services.gateway.application.inference.core import InferenceCore, InferenceResult, parse_timeout
from services.gateway.domain import generate
from services.gateway.domain.traffic_split import Origin
from services.gateway.domain.usage_cost import UsageCost
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, ModelFailed, TidegateError
from tidegate.kernel.http.answers import error_body
from tidegate.kernel.protocol.access import Principal
from tidegate.kernel.protocol.envelope import Buffer
from tidegate.kernel.protocol.redaction import for_caller
from tidegate.kernel.service import caller

log = telemetry.logger(__name__)


class GenerateCall(NamedTuple):
    """A request whose body has arrived.

    ``started``: the value of ``time.perf_counter()`` when the body had arrived.
    """

    model: str
    version: str
    timeout_ms: float | None
    body: Buffer
    held: Body
    started: float
    grant: Grant | None
    cost: UsageCost
    headers: Headers
    principal: Principal

    def origin(self) -> Origin:
        """Return the facts of the request that are needed for traffic rules and sticky keys."""
        return Origin(self.headers, self.principal.id, lambda: generate.request_parameters(self.body))

    def end(self) -> None:
        """Record the usage and free the body, after success or failure."""
        if self.grant is not None:
            self.grant.streamed(self.cost, len(self.body))
        self.held.release()


class GenerateRoutes:
    """The routes of Triton's generate extension. The path may name a version of the model."""

    def __init__(
        self,
        core: InferenceCore,
        access: Access,
        limits: BodyLimits,
        metrics: GatewayMetrics,
        log: AccessLog | None = None,
    ) -> None:
        self._core = core
        self._access = access
        self._limits = limits
        self._log = log or AccessLog.off()
        self._observer = StreamObserver("rest", metrics, self._log)
        self.router = APIRouter(prefix="/v2", tags=["Generate extension"])
        for path in ("/models/{model}", "/models/{model}/versions/{version}"):
            self.router.add_api_route(f"{path}/generate", self.generate, methods=["POST"])
            self.router.add_api_route(f"{path}/generate_stream", self.generate_stream, methods=["POST"])

    async def generate(self, request: Request, model: str, version: str = "") -> Response:
        """Return the model's only answer, as a JSON object with each output under its name."""
        call = await self._read(request, model, version)
        return CancellableResponse(lambda send: self._one(call, send), call.end)

    async def generate_stream(self, request: Request, model: str, version: str = "") -> Response:
        """Stream any number of answers, each as an event ``data: {...}``."""
        call = await self._read(request, model, version)
        return CancellableResponse(lambda send: self._many(call, send), call.end)

    async def _read(self, request: Request, model: str, version: str) -> GenerateCall:
        headers: Headers = dict(request.scope["headers"])
        timeout_ms = parse_timeout(headers.get(b"x-request-timeout-ms"))
        received = await receive_body(request, self._limits)
        try:
            self._core.find(model, version)
            grant = self._access.admit(caller.current.get().principal, model)
        except BaseException:
            received.held.release()
            raise
        body, held, started = received
        principal = caller.current.get().principal
        return GenerateCall(
            model, version, timeout_ms, body, held, started, grant, UsageCost(), headers, principal
        )

    def _answers(self, call: GenerateCall) -> AsyncGenerator[InferenceResult]:
        trace = self._log.begin(telemetry.request_id.get().encode("latin-1", "replace"), call.headers)
        stream = self._core.stream(
            call.model,
            call.version,
            call.timeout_ms,
            lambda contract: generate.decode(call.body, contract),
            trace,
            call.cost.begin,
            call.origin,
            call.principal,
        )
        return self._observer.watch(
            call.model, call.started, len(call.body), call.cost, stream, trace=trace, headers=call.headers
        )

    def _feedback_of(self, call: GenerateCall) -> PendingId | None:
        rid = telemetry.request_id.get().encode("latin-1", "replace")
        return self._core.feedback.begin(call.model, call.version, call.origin, rid, call.principal)

    async def _one(self, call: GenerateCall, send: Send) -> None:
        pending = self._feedback_of(call)
        async with aclosing(self._answers(call)) as answers:
            answer = await anext(answers, None)
            if answer is None:
                raise ModelFailed(
                    "the model returned no answer, but /generate needs one: use /generate_stream"
                )
            if await anext(answers, None) is not None:
                raise BadRequest("the model returned more than one answer: use /generate_stream")
        encoding = time.perf_counter()
        body = _encoded(call, answer)
        now = time.perf_counter()
        answer.timing.encode = now - encoding
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"server-timing", server_timing(answer, now - call.started)),
            *_feedback_header(pending, answer),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _many(self, call: GenerateCall, send: Send) -> None:
        pending = self._feedback_of(call)
        async with aclosing(self._answers(call)) as answers:
            # The headers are sent after the first answer, so that an earlier error can set the status code.
            answer = await anext(answers, None)
            headers = [*EVENT_STREAM, *_feedback_header(pending, answer)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            try:
                while answer is not None:
                    await _event(send, _encoded(call, answer))
                    answer = await anext(answers, None)
            except TidegateError as error:
                await _event(send, _error(for_caller(error), error.reason))
            except Exception:
                log.exception("unexpected error in a stream")
                await _event(send, _error("internal error; see the log of the service", "internal"))
        await send({"type": "http.response.body", "body": b""})


async def _event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": True})


def _feedback_header(pending: PendingId | None, answer: InferenceResult | None) -> list[tuple[bytes, bytes]]:
    return [] if pending is None or answer is None else [(FEEDBACK_ID, pending.id(answer.route))]


def _encoded(call: GenerateCall, answer: InferenceResult) -> bytes:
    body = generate.encode(
        call.model,
        answer.route.version,
        answer.request.id,
        answer.outputs,
        answer.parameters,
        answer.reply.data,
    )
    call.cost.add(answer.reply, answer.parameters, len(body), answer.route)
    return body


def _error(message: str, reason: str) -> bytes:
    return orjson.dumps(error_body(message, reason, telemetry.request_id.get()))

"""The steps that all APIs for language models share: read a request, run it, count it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, NamedTuple

from fastapi import Request, Response

from services.gateway.api.body_limits import Body, BodyLimits
from services.gateway.api.llm.event_stream import KEEP_ALIVE
from services.gateway.api.metrics import GatewayMetrics
from services.gateway.api.request_body import receive_body
from services.gateway.api.stream_observer import StreamObserver
from services.gateway.application.access_log import AccessLog
from services.gateway.application.inference.core import parse_timeout
from services.gateway.application.llm.core import LlmCall, LlmCore, LlmEvents
from services.gateway.domain.llm.band import band_of
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, Forbidden
from tidegate.kernel.protocol import bounded_json
from tidegate.kernel.protocol.access import INFER, Principal, may_not_use
from tidegate.kernel.service import caller

Headers = dict[bytes, bytes]


class ReceivedRequest(NamedTuple):
    """A request with its JSON body.

    ``held``: the memory of the body. ``size``: bytes of the body. ``started``: the time of
    ``time.perf_counter`` at which the body was complete.
    """

    body: dict[str, Any]
    headers: Headers
    held: Body
    size: int
    started: float

    def end(self) -> None:
        """Free the memory of the body. Call this after success and after failure."""
        self.held.release()


class LlmDoor:
    """The steps that all APIs for language models share. Each API adds only its codec."""

    def __init__(
        self,
        core: LlmCore,
        limits: BodyLimits,
        metrics: GatewayMetrics,
        log: AccessLog,
        *,
        queue_comments: bool = False,
    ) -> None:
        """``queue_comments``: True if a stream that waits gets comments with its position in the queue.

        The header ``X-Tidegate-Queue`` of a request overrides this setting.
        """
        self.core = core
        self._queue_comments = queue_comments
        self._limits = limits
        self._metrics = metrics
        self._log = log
        self._observers: dict[str, StreamObserver] = {}

    async def receive(self, request: Request) -> ReceivedRequest:
        """Return a request with a JSON object as its body. Raise a TidegateError if it is refused.

        The calling code must call :meth:`ReceivedRequest.end` when the answer is complete.
        """
        received = await receive_body(request, self._limits)
        try:
            body = bounded_json.loads(received.body)
            if not isinstance(body, dict):
                raise BadRequest("the request must be a JSON object")
        except BaseException:
            received.held.release()
            raise
        headers: Headers = dict(request.scope["headers"])
        return ReceivedRequest(body, headers, received.held, len(received.body), received.started)

    def find(self, model: str) -> DeploymentRoute:
        """Return the Deployment of a model.

        Raise NotFound if the model or adapter is unknown, BadRequest if the model is not a language model,
        and Forbidden if the caller may not use the model.
        """
        endpoint, route = self.core.find(model)
        if not principal().may(INFER, endpoint.name):
            raise Forbidden(may_not_use(principal(), endpoint.name))
        return route

    def call(self, received: ReceivedRequest, model: str, path: str, body: dict[str, Any]) -> LlmCall:
        """Return a call to OpenAI's API at ``path``; raise BadRequest if a header is invalid.

        ``body`` is in OpenAI's format. This method sets the model in ``body``. If the call is a stream of
        completions, ``body`` also gets the option that makes the engine send token counts.
        """
        body["model"] = model
        if body.get("stream") is True and path.endswith("completions"):
            asked = body.get("stream_options")
            body["stream_options"] = (asked if isinstance(asked, dict) else {}) | {"include_usage": True}
        return LlmCall(
            model,
            path,
            body,
            band=band_of(received.headers, body),
            timeout_ms=parse_timeout(received.headers.get(b"x-request-timeout-ms")),
            principal=principal(),
            trace=self._log.begin(telemetry.request_id.get().encode("latin-1", "replace"), received.headers),
            received=received.size,
            headers=received.headers,
        )

    def comment(self, received: ReceivedRequest, call: LlmCall) -> bytes:
        """Return the comment to send while a stream has no event.

        If the caller wants the request's position in the queue and it is known, the comment contains this
        position. Otherwise the comment only keeps the connection open.
        """
        asked = received.headers.get(b"x-tidegate-queue", b"").strip().lower()
        wanted = self._queue_comments if asked == b"" else asked in (b"1", b"true", b"on")
        place = self.core.place(call) if wanted and not call.cost.answers else None
        return KEEP_ALIVE if place is None else place.comment()

    def run(self, protocol: str, received: ReceivedRequest, call: LlmCall) -> AsyncGenerator[LlmEvents]:
        """Run a call, and yield its events as :meth:`LlmCore.stream` does.

        The call is counted, and it is logged under the name ``protocol``.
        """
        observer = self._observers.get(protocol)
        if observer is None:
            observer = self._observers[protocol] = StreamObserver(protocol, self._metrics, self._log)
        return observer.watch(
            call.endpoint,
            received.started,
            received.size,
            call.cost,
            self.core.stream(call),
            trace=call.trace,
            headers=call.headers,
        )


def bound(answer: Callable[..., Awaitable[Response]], **fixed: Any) -> Callable[..., Awaitable[Response]]:
    """Return a route's function that calls ``answer`` with the request and the arguments ``fixed``.

    ``functools.partial`` is not safe here: FastAPI would read these arguments from the query of the URL, so
    callers could change them.
    """

    async def answer_bound(request: Request) -> Response:
        return await answer(request, **fixed)

    answer_bound.__doc__ = answer.__doc__
    return answer_bound


def principal() -> Principal:
    """Return the caller of the current request."""
    return caller.current.get().principal

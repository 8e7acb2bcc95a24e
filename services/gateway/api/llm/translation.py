"""The common parts of the APIs other than OpenAI's: find the model, translate events and errors."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import Request, Response
from starlette.types import Send

from services.gateway.api.cancellable_response import CancellableResponse
from services.gateway.api.llm.door import LlmDoor, ReceivedRequest, principal
from services.gateway.api.llm.openai_errors import headers_of
from services.gateway.application.llm.core import LlmCall, only_answer
from services.gateway.domain.llm.engine_events import Piece, read_all
from services.gateway.domain.llm.model_choice import chosen
from services.gateway.domain.llm.refusal import EngineRefused
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.redaction import for_caller
from tidegate.kernel.service.error_answers import status_of

log = telemetry.logger(__name__)

Make = Callable[[ReceivedRequest, Send], Awaitable[None]]

MODEL_HEADER = "x-tidegate-model"
INTERNAL = TidegateError("internal error; see the log of the service")


@dataclass(slots=True)
class Answered:
    """The next pieces of an answer.

    ``load``: the seconds from the complete request to the first piece, without the time in which the engine
    computed.
    """

    pieces: list[Piece]
    load: float


class Translation:
    """The translation between one API and the shared :class:`LlmDoor`.

    ``protocol``: the API's name in the log. ``error_body`` makes the body of an error from the error and the
    message for the caller. ``wrong``: the HTTP status for an invalid request.
    """

    def __init__(
        self,
        door: LlmDoor,
        protocol: str,
        error_body: Callable[[TidegateError, str], Mapping[str, Any]],
        wrong: int = 400,
    ) -> None:
        self.door = door
        self._protocol = protocol
        self._error_body = error_body
        self._wrong = wrong

    def model(self, request: Request, named: object, how: str) -> str:
        """Return the model that a request names, or else the only model that its caller may use.

        ``how``: the ways to name a model, as text for the error.

        A request may name no model. Then raise NotFound if its caller may use no model, and BadRequest if its
        caller may use several.
        """
        given = [
            request.path_params.get("model"),
            request.headers.get(MODEL_HEADER),
            request.query_params.get("model"),
            named if isinstance(named, str) else None,
        ]
        if any(given):
            return chosen(given, [], how)
        return chosen([], [name for name, _ in self.door.core.models(principal())], how)

    async def respond(self, request: Request, make: Make) -> Response:
        """Return the response that ``make`` writes. Errors have the format of this API."""
        try:
            received = await self.door.receive(request)
        except TidegateError as error:
            return self.refusal(error)
        return CancellableResponse(lambda send: self._guarded(make, received, send), received.end)

    async def _guarded(self, make: Make, received: ReceivedRequest, send: Send) -> None:
        try:
            await make(received, send)
        except TidegateError as error:
            await send_response(send, self.refusal(error))
        except Exception:
            log.exception("unexpected error in a request to a language model")
            await send_response(send, self.refusal(INTERNAL))

    def refusal(self, error: TidegateError) -> Response:
        """Return an error as a response."""
        status = code_of(error)
        status = self._wrong if status == 400 else status
        return Response(self.error(error), status, headers_of(error), "application/json")

    def error(self, error: TidegateError) -> bytes:
        """Return the body of an error."""
        return orjson.dumps(self._error_body(error, for_caller(error)))

    async def answers(self, received: ReceivedRequest, call: LlmCall) -> AsyncGenerator[Answered]:
        """Run a call, and yield the pieces of its answer."""
        load: float | None = None
        async with aclosing(self.door.run(self._protocol, received, call)) as answers:
            async for answer in answers:
                if load is None:
                    load = max(0.0, time.perf_counter() - received.started - answer.timing.compute)
                yield Answered(read_all(answer.events, answer.meta.ids), load)

    async def only(self, received: ReceivedRequest, call: LlmCall) -> tuple[bytes, float]:
        """Run a call. Return its answer's body, and the seconds in which no engine worked on the call."""
        answer = await only_answer(self.door.run(self._protocol, received, call))
        call.cost.sent += len(answer.events[0])
        return answer.events[0], max(0.0, time.perf_counter() - received.started - answer.timing.compute)


def code_of(error: TidegateError) -> int:
    """Return the status code of an error. It is 502 if a provider refuses this stack's credential."""
    if isinstance(error, EngineRefused):
        return 502 if error.status in (401, 403) else error.status
    return status_of(error)


def grants(call: LlmCall) -> list[tuple[bytes, bytes]]:
    """Return the headers that show the caller's limits."""
    return call.answer_headers()


async def send_json(send: Send, document: Any, headers: Sequence[tuple[bytes, bytes]] = ()) -> int:
    """Send ``document`` as JSON. Return the size of the body in bytes.

    If ``document`` is bytes, it is already JSON and is sent unchanged.
    """
    body = document if isinstance(document, bytes) else orjson.dumps(document)
    fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": body})
    return len(body)


async def send_response(send: Send, response: Response) -> None:
    """Send a complete response."""
    start = {"status": response.status_code, "headers": response.raw_headers}
    await send({"type": "http.response.start", **start})
    await send({"type": "http.response.body", "body": response.body})


def json_response(document: Any) -> Response:
    """Return a JSON answer."""
    return Response(orjson.dumps(document), media_type="application/json")

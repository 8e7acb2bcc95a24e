"""Serve OpenAI's API: chat and text completions, embeddings, responses, and the list of models."""

from __future__ import annotations

import time
from contextlib import aclosing
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from starlette.types import Send

from services.gateway.api.cancellable_response import CancellableResponse
from services.gateway.api.llm import openai_errors
from services.gateway.api.llm.door import LlmDoor, ReceivedRequest, bound, principal
from services.gateway.api.llm.event_stream import EventStream
from services.gateway.api.llm.jobs import LlmJobs
from services.gateway.api.llm.openai_errors import openai_response
from services.gateway.api.server_timing import server_timing, stream_timing
from services.gateway.application.llm.core import LlmCall, LlmEvents, only_answer
from services.gateway.domain.llm.openai_events import DONE, EventFilter, named_sse, sse, wants_usage
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel import telemetry
from tidegate.kernel.errors import BadRequest, TidegateError

log = telemetry.logger(__name__)

PROTOCOL = "openai"
RESPONSES = "/v1/responses"
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", RESPONSES)


class OpenAiRoutes:
    """The routes of OpenAI's API. They translate nothing, because the engines themselves speak this API."""

    def __init__(self, door: LlmDoor, jobs: LlmJobs) -> None:
        self._door = door
        self._jobs = jobs
        self.router = APIRouter(tags=["OpenAI"])
        for path in PATHS:
            name = path.removeprefix("/v1/").replace("/", "_")
            self.router.add_api_route(
                path, bound(self.answer, path=path), methods=["POST"], name=name, response_model=None
            )
        self.router.add_api_route("/v1/models", self.models, methods=["GET"])
        self.router.add_api_route("/v1/models/{model}", self.model, methods=["GET"])

    async def models(self) -> Response:
        """Return the language models that the caller may use."""
        try:
            found = self._door.core.models(principal())
        except TidegateError as error:
            return openai_response(error)
        return _json({"object": "list", "data": [_model(name, route) for name, route in found]})

    async def model(self, model: str) -> Response:
        """Return one language model."""
        try:
            route = self._door.find(model)
        except TidegateError as error:
            return openai_response(error)
        return _json(_model(model, route))

    async def answer(self, request: Request, *, path: str, model: str = "") -> Response:
        """Answer a request with what the engine returns: one JSON body, or server-sent events.

        If the header ``Prefer`` requests a job, run the request as a job. If ``model`` is not empty, it
        replaces the model in the body.
        """
        try:
            received = await self._door.receive(request)
        except TidegateError as error:
            return openai_response(error)
        if model:
            received.body["model"] = model
        if (prefer := self._jobs.preference(received)) is not None:
            try:
                return await self._jobs.answer(received, path, prefer)
            except TidegateError as error:
                return openai_response(error)
            finally:
                received.end()
        return CancellableResponse(lambda send: self._respond(received, path, send), received.end)

    async def _respond(self, received: ReceivedRequest, path: str, send: Send) -> None:
        try:
            body = received.body
            model = body.get("model")
            if not isinstance(model, str) or not model:
                raise BadRequest("'model' must be the name of a model: GET /v1/models lists all models")
            events = EventFilter(model, usage=path == RESPONSES or wants_usage(body))
            call = self._door.call(received, model, path, body)
            if call.streamed:
                await self._stream(received, call, events, send)
            else:
                await self._whole(received, call, events, send)
        except TidegateError as error:
            await _send(send, openai_response(error))
        except Exception:
            log.exception("unexpected error in a request to a language model")
            failure = openai_errors.internal()
            await _send(send, Response(failure.body(), failure.status, media_type="application/json"))

    async def _whole(self, received: ReceivedRequest, call: LlmCall, events: EventFilter, send: Send) -> None:
        answer = await only_answer(self._door.run(PROTOCOL, received, call))
        body = events.named(answer.events[0])
        call.cost.sent += len(body)
        total = time.perf_counter() - received.started
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"server-timing", server_timing(answer, total)),
            *call.answer_headers(),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(
        self, received: ReceivedRequest, call: LlmCall, events: EventFilter, send: Send
    ) -> None:
        named = call.path == RESPONSES
        encode = named_sse if named else sse
        first: tuple[LlmEvents, float] | None = None
        async with (
            EventStream(send, call.answer_headers, partial(self._door.comment, received, call)) as stream,
            aclosing(self._door.run(PROTOCOL, received, call)) as answers,
        ):
            try:
                async for answer in answers:
                    first = first or (answer, time.perf_counter() - received.started)
                    data = b"".join(
                        [encode(event) for each in answer.events if (event := events.chunk(each))]
                    )
                    if data:
                        call.cost.sent += len(data)
                        await stream.write(data)
            except TidegateError as error:
                if not stream.started:
                    raise
                await stream.end(openai_errors.openai_error(error).event(named=named))
                return
            except Exception:
                if not stream.started:
                    raise
                log.exception("unexpected error in a stream")
                await stream.end(openai_errors.internal().event(named=named))
                return
            total = time.perf_counter() - received.started
            timing = b": server-timing: %b\n\n" % stream_timing(first, total)
            await stream.end(timing if named else timing + DONE)


def _model(name: str, route: DeploymentRoute) -> dict[str, Any]:
    assert route.llm is not None
    shown: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": route.llm.created,
        "owned_by": "tidegate",
    }
    if route.llm.context is not None:
        shown["max_model_len"] = route.llm.context
    if ":" in name:
        shown["parent"] = name.partition(":")[0]
    return shown


def _json(document: Any) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


async def _send(send: Send, response: Response) -> None:
    await send(
        {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    )
    await send({"type": "http.response.body", "body": response.body})

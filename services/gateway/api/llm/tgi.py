"""Serve the API of TGI (Text Generation Inference): /generate, /generate_stream, /, /info, /health."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Send

from services.gateway.api.llm.door import LlmDoor, ReceivedRequest, bound
from services.gateway.api.llm.event_stream import EventStream
from services.gateway.api.llm.openai import OpenAiRoutes
from services.gateway.api.llm.translation import (
    INTERNAL,
    MODEL_HEADER,
    Translation,
    grants,
    json_response,
    log,
    send_json,
)
from services.gateway.application.llm.core import LlmCall
from services.gateway.domain.llm import members, tgi_answers, tgi_requests
from services.gateway.domain.llm.openai_events import sse
from services.gateway.domain.llm.tgi_answers import TgiAnswer
from services.gateway.domain.llm.tgi_requests import Generation
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.version import VERSION

_HOW = f"the path /tgi/NAME/..., the header {MODEL_HEADER}, ?model=NAME or the member 'model'"
# TGI answers invalid requests with this status.
WRONG = 422
OF_MODEL = "/tgi/{model}"


class TgiRoutes:
    """The routes of TGI. Each is also below ``/tgi/{model}``, for clients that cannot send a model's name."""

    def __init__(self, door: LlmDoor, openai: OpenAiRoutes) -> None:
        self._api = Translation(door, "tgi", _error_body, WRONG)
        self._openai = openai
        self.router = APIRouter(tags=["TGI"])
        for prefix in ("", OF_MODEL):
            self._post(f"{prefix}/generate", bound(self.generate, stream=False), "generate")
            self._post(f"{prefix}/generate_stream", bound(self.generate, stream=True), "generate_stream")
            self._post(prefix or "/", self.compatible, "compatible")
            self.router.add_api_route(f"{prefix}/info", self.info, methods=["GET"])
            self.router.add_api_route(
                f"{prefix}/health", self.health, methods=["GET"], response_class=Response
            )
        for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
            self._post(f"{OF_MODEL}{path}", bound(self.openai, path=path), f"tgi{path.replace('/', '_')}")

    def _post(self, path: str, answer: Any, name: str) -> None:
        self.router.add_api_route(path, answer, methods=["POST"], name=name, response_model=None)

    async def generate(self, request: Request, *, stream: bool) -> Response:
        """Continue a prompt. The answer is one JSON object, or server-sent events if ``stream`` is True."""
        return await self._answer(request, stream)

    async def compatible(self, request: Request) -> Response:
        """Continue a prompt, as TGI's ``/`` does.

        The answer is a stream of events if the body's ``stream`` is true, else a list of one object.
        """
        return await self._answer(request, None)

    async def openai(self, request: Request, *, path: str) -> Response:
        """Answer a request of OpenAI's API with the model that the path names."""
        return await self._openai.answer(request, path=path, model=request.path_params["model"])

    async def info(self, request: Request) -> Response:
        """Return a model's facts, in the form that TGI's clients read."""
        try:
            model = self._api.model(request, None, _HOW)
            route = self._api.door.find(model)
        except TidegateError as error:
            return self._api.refusal(error)
        assert route.llm is not None
        return json_response(tgi_answers.info(model, route.llm.context, route.llm.slots, VERSION))

    async def health(self, request: Request, model: str = "") -> Response:
        """Answer 200 if requests can be routed and queued, else 503.

        If the path names a model, the model must also be ready.
        """
        try:
            if problems := request.app.state.health.problems():
                raise Unavailable("; ".join(problems.values()), retry_after_s=1.0)
            if model and (why := request.app.state.catalogue.not_ready(model, "")):
                raise Unavailable(f"{model} is not ready: {why}", reason="not_ready", retry_after_s=1.0)
        except TidegateError as error:
            return self._api.refusal(error)
        return Response()

    async def _answer(self, request: Request, stream: bool | None) -> Response:
        """Answer a request. If ``stream`` is None, the field ``stream`` of the body decides."""

        async def make(received: ReceivedRequest, send: Send) -> None:
            whole = members.flag(received.body, "stream") if stream is None else stream
            asked = tgi_requests.decode(received.body, stream=whole)
            model = self._api.model(request, received.body.get("model"), _HOW)
            name = f"{model}:{asked.adapter}" if asked.adapter else model
            call = self._api.door.call(received, name, tgi_requests.PATH, asked.body)
            if whole:
                await self._stream(received, call, asked, send)
            else:
                await self._whole(received, call, asked, send, in_list=stream is None)

        return await self._api.respond(request, make)

    async def _whole(
        self, received: ReceivedRequest, call: LlmCall, asked: Generation, send: Send, *, in_list: bool
    ) -> None:
        answer = TgiAnswer(asked)
        async with aclosing(self._api.answers(received, call)) as answers:
            async for each in answers:
                for piece in each.pieces:
                    answer.add(piece)
        document = answer.whole()
        call.cost.sent += await send_json(send, [document] if in_list else document, grants(call))

    async def _stream(self, received: ReceivedRequest, call: LlmCall, asked: Generation, send: Send) -> None:
        answer = TgiAnswer(asked)
        async with (
            EventStream(
                send, partial(grants, call), partial(self._api.door.comment, received, call)
            ) as stream,
            aclosing(self._api.answers(received, call)) as answers,
        ):
            try:
                async for each in answers:
                    events = [event for piece in each.pieces for event in answer.add(piece)]
                    if events:
                        data = b"".join(map(sse, events))
                        call.cost.sent += len(data)
                        await stream.write(data)
                await stream.end(sse(answer.last_event()))
            except TidegateError as error:
                if not stream.started:
                    raise
                await stream.end(sse(self._api.error(error)))
            except Exception:
                if not stream.started:
                    raise
                log.exception("unexpected error in a stream")
                await stream.end(sse(self._api.error(INTERNAL)))


def _error_body(error: TidegateError, message: str) -> dict[str, str]:
    return {"error": message, "error_type": tgi_answers.error_type(error)}

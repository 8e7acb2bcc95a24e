"""Serve engines' routes that OpenAI's API lacks: /tokenize, /detokenize, and vLLM's scores."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.types import Send

from services.gateway.api.llm.door import LlmDoor, ReceivedRequest, bound
from services.gateway.api.llm.openai_errors import openai_error
from services.gateway.api.llm.translation import (
    MODEL_HEADER,
    Translation,
    json_response,
    send_json,
)
from services.gateway.domain.llm import engine_extras
from services.gateway.domain.llm.engine_extras import DETOKENIZE, PASSED, TEMPLATE, TOKENIZE
from services.gateway.domain.llm.openai_events import EventFilter
from services.gateway.domain.llm.refusal import EngineRefused
from tidegate.kernel.errors import TidegateError
from tidegate.version import VERSION

# An engine answers with one of these HTTP statuses if it does not have the URL path, or if its model cannot
# do what the path offers.
_NOT_THERE = (404, 405, 501)
_HOW = f"the member 'model', the header {MODEL_HEADER} or ?model=NAME"


class ExtraRoutes:
    """The engines' routes that are not in OpenAI's API.

    If the engine of a model does not have a route, callers get 404.
    """

    def __init__(self, door: LlmDoor) -> None:
        self._api = Translation(door, "extras", _error_body)
        self.router = APIRouter(tags=["Engines"])
        self._post(TOKENIZE, self.tokenize)
        self._post(DETOKENIZE, self.detokenize)
        for path in PASSED:
            self._post(path, bound(self.passed, path=path))
        self.router.add_api_route("/version", self.version, methods=["GET"])

    def _post(self, path: str, answer: Any) -> None:
        name = path[1:].replace("/", "_")
        self.router.add_api_route(path, answer, methods=["POST"], name=name, response_model=None)

    async def version(self) -> Response:
        """Return the version of Tidegate."""
        return json_response({"version": VERSION})

    async def tokenize(self, request: Request) -> Response:
        """Return the tokens of a text or a chat. The request may have vLLM's, llama.cpp's or TGI's format."""

        async def make(received: ReceivedRequest, send: Send) -> None:
            model = self._model(request, received)
            route = self._api.door.find(model)
            body = received.body
            raw = await self._call(received, model, TOKENIZE, engine_extras.tokenize(body))
            if body.get("messages") and engine_extras.lacks_template(raw):
                text = await self._call(received, model, TEMPLATE, {"messages": body["messages"]})
                raw = await self._call(received, model, TOKENIZE, engine_extras.templated(text, body))
            context = None if route.llm is None else route.llm.context
            await send_json(send, engine_extras.tokens(raw, body, context))

        return await self._api.respond(request, make)

    async def detokenize(self, request: Request) -> Response:
        """Return the text of tokens."""

        async def make(received: ReceivedRequest, send: Send) -> None:
            body = engine_extras.detokenize(received.body)
            raw = await self._call(received, self._model(request, received), DETOKENIZE, body)
            await send_json(send, engine_extras.text_of(raw))

        return await self._api.respond(request, make)

    async def passed(self, request: Request, *, path: str) -> Response:
        """Send a request to the engine, and return the engine's answer to the caller."""

        async def make(received: ReceivedRequest, send: Send) -> None:
            model = self._model(request, received)
            raw = await self._call(received, model, path, received.body)
            await send_json(send, EventFilter(model, usage=True).named(raw))

        return await self._api.respond(request, make)

    def _model(self, request: Request, received: ReceivedRequest) -> str:
        return self._api.model(request, received.body.get("model"), _HOW)

    async def _call(self, received: ReceivedRequest, model: str, path: str, body: dict[str, Any]) -> bytes:
        """Return an engine's answer. Raise NotFound if the engine does not have the path."""
        try:
            raw, _ = await self._api.only(received, self._api.door.call(received, model, path, body))
        except EngineRefused as error:
            if error.status in _NOT_THERE:
                raise engine_extras.not_there(model, path, error.message) from error
            raise
        return raw


def _error_body(error: TidegateError, _: str) -> dict[str, Any]:
    return openai_error(error).document()

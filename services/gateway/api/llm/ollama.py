"""Serve Ollama's API: chats, generated text, embeddings, and facts about the models."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, NoReturn

from fastapi import APIRouter, Request, Response
from starlette.types import Send

from services.gateway.api.llm.door import LlmDoor, ReceivedRequest, bound, principal
from services.gateway.api.llm.event_stream import EventStream
from services.gateway.api.llm.translation import INTERNAL, Translation, grants, json_response, log, send_json
from services.gateway.application.llm.core import LlmCall
from services.gateway.domain.llm import ollama_answers, ollama_models, ollama_requests
from services.gateway.domain.llm.members import Members
from services.gateway.domain.llm.ollama_answers import Durations, OllamaAnswer
from services.gateway.domain.llm.ollama_models import LlmModel
from services.gateway.domain.llm.ollama_requests import EMBEDDINGS, OllamaCall, endpoint
from services.gateway.domain.llm.refusal import EngineRefused
from services.gateway.domain.routing import DeploymentRoute
from tidegate.kernel.errors import BadRequest, TidegateError

NDJSON = [(b"content-type", b"application/x-ndjson"), (b"cache-control", b"no-cache")]
# This header lists the JSON members of a request that have no effect, each with the reason.
IGNORED = b"x-tidegate-ignored"
_NS = 1_000_000_000

Translate = Callable[[Members], OllamaCall]


class OllamaRoutes:
    """The routes of Ollama. Routes that manage models return an error with the command to run instead."""

    def __init__(self, door: LlmDoor) -> None:
        self._door = door
        self._api = Translation(door, "ollama", lambda _, message: {"error": message})
        self.router = APIRouter(prefix="/api", tags=["Ollama"])
        self._add("POST", "/chat", bound(self.generate, translate=ollama_requests.chat), "chat")
        self._add("POST", "/generate", bound(self.generate, translate=ollama_requests.generate), "generate")
        self._add("POST", "/embed", self.embed, "embed")
        self._add("POST", "/embeddings", self.embed_one, "embeddings")
        self._add("POST", "/show", self.show, "show")
        for name in ("pull", "push", "create", "copy"):
            self._add("POST", f"/{name}", bound(self.manage, what=name), name)
        self._add("DELETE", "/delete", bound(self.manage, what="delete"), "delete")
        for method in ("HEAD", "POST"):
            self._add(method, "/blobs/{digest}", bound(self.manage, what="blobs"), f"blobs_{method.lower()}")
        for name in ("tags", "ps", "version"):
            self._add("GET", f"/{name}", getattr(self, name), name)

    def _add(self, method: str, path: str, answer: Any, name: str) -> None:
        name = f"ollama_{name}"
        self.router.add_api_route(path, answer, methods=[method], name=name, response_model=None)

    async def generate(self, request: Request, *, translate: Translate) -> Response:
        """Continue a chat or a prompt.

        The answer is a stream of JSON lines. If ``stream`` is false, it is one JSON object.
        """

        async def make(received: ReceivedRequest, send: Send) -> None:
            asked = translate(received.body)
            name = endpoint(asked.model)
            ignored = _ignored(asked.ignored)
            if not asked.path:
                self._door.find(name)
                await send_json(send, ollama_answers.loaded(asked, _now()), ignored)
                return
            call = self._door.call(received, name, asked.path, asked.body)
            try:
                await self._answer(received, call, asked, send, ignored)
            except EngineRefused as error:
                _explain(error, asked)
                raise

        return await self._api.respond(request, make)

    async def _answer(
        self,
        received: ReceivedRequest,
        call: LlmCall,
        asked: OllamaCall,
        send: Send,
        ignored: list[tuple[bytes, bytes]],
    ) -> None:
        answer = OllamaAnswer(asked)
        if asked.stream:
            await self._stream(received, call, answer, send, ignored)
            return
        load = first = 0.0
        async with aclosing(self._api.answers(received, call)) as answers:
            async for each in answers:
                load, first = each.load, first or time.perf_counter() - received.started
                for piece in each.pieces:
                    answer.add(piece, _now())
        document = answer.whole(_now(), _durations(received, load, first))
        call.cost.sent += await send_json(send, document, [*grants(call), *ignored])

    async def _stream(
        self,
        received: ReceivedRequest,
        call: LlmCall,
        answer: OllamaAnswer,
        send: Send,
        ignored: list[tuple[bytes, bytes]],
    ) -> None:
        load = first = 0.0
        async with (
            EventStream(
                send,
                lambda: [*grants(call), *ignored],
                lambda: _lines([answer.nothing(_now())]),
                NDJSON,
            ) as stream,
            aclosing(self._api.answers(received, call)) as answers,
        ):
            try:
                async for each in answers:
                    load, first = each.load, first or time.perf_counter() - received.started
                    lines = [line for piece in each.pieces for line in answer.add(piece, _now())]
                    if lines:
                        data = _lines(lines)
                        call.cost.sent += len(data)
                        await stream.write(data)
                await stream.end(_lines(answer.end(_now(), _durations(received, load, first))))
            except TidegateError as error:
                if not stream.started:
                    raise
                await stream.end(_lines([self._api.error(error)]))
            except Exception:
                if not stream.started:
                    raise
                log.exception("unexpected error in a stream")
                await stream.end(_lines([self._api.error(INTERNAL)]))

    async def embed(self, request: Request) -> Response:
        """Return the embeddings of texts."""

        async def make(received: ReceivedRequest, send: Send) -> None:
            body, ignored = ollama_requests.embed(received.body)
            model, call, raw, load = await self._embeddings(received, body)
            durations = _durations(received, load, load)
            document = ollama_answers.embeddings(model, raw, durations)
            call.cost.sent += await send_json(send, document, [*grants(call), *_ignored(ignored)])

        return await self._api.respond(request, make)

    async def embed_one(self, request: Request) -> Response:
        """Return the embedding of one text."""

        async def make(received: ReceivedRequest, send: Send) -> None:
            body, ignored = ollama_requests.embed_one(received.body)
            _, call, raw, _ = await self._embeddings(received, body)
            document = ollama_answers.embedding(raw)
            call.cost.sent += await send_json(send, document, [*grants(call), *_ignored(ignored)])

        return await self._api.respond(request, make)

    async def _embeddings(
        self, received: ReceivedRequest, body: dict[str, Any]
    ) -> tuple[str, LlmCall, bytes, float]:
        model = ollama_requests.model_of(received.body)
        call = self._door.call(received, endpoint(model), EMBEDDINGS, body)
        raw, load = await self._api.only(received, call)
        return model, call, raw, load

    async def tags(self) -> Response:
        """Return the language models that the caller may use."""
        return self._listed(ollama_models.tags)

    async def ps(self) -> Response:
        """Return the language models that the caller may use and that have a ready replica."""
        return self._listed(ollama_models.running)

    def _listed(self, form: Callable[[list[LlmModel]], Any]) -> Response:
        try:
            return json_response(form([_model(*each) for each in self._door.core.models(principal())]))
        except TidegateError as error:
            return self._api.refusal(error)

    async def version(self) -> Response:
        """Return the version of Ollama's API that these routes follow."""
        return json_response({"version": ollama_models.API_VERSION})

    async def show(self, request: Request) -> Response:
        """Return the facts about one model."""

        async def make(received: ReceivedRequest, send: Send) -> None:
            name = endpoint(ollama_requests.model_of(received.body))
            await send_json(send, ollama_models.show(_model(name, self._door.find(name))))

        return await self._api.respond(request, make)

    async def manage(self, request: Request, *, what: str) -> Response:
        """Refuse to manage models, and return the command to run instead."""
        return self._api.refusal(BadRequest(f"this API cannot manage models: {ollama_models.INSTEAD[what]}"))


def _model(name: str, route: DeploymentRoute) -> LlmModel:
    assert route.llm is not None
    changed = ollama_answers.stamp(datetime.fromtimestamp(route.llm.created, UTC))
    return LlmModel(name, route.llm.context, route.ready > 0, changed)


def _explain(error: EngineRefused, asked: OllamaCall) -> NoReturn:
    """Raise the engine's error, or BadRequest if the engine does not accept images.

    No common error code says that an engine does not accept images. So this function looks for words such as
    "image" in the engine's message.
    """
    if asked.images and any(word in error.message for word in ("image", "multimodal")):
        raise BadRequest(f"the model {asked.model!r} does not accept images: {error.message}") from error
    raise error


def _durations(received: ReceivedRequest, load: float, first: float) -> Durations:
    total = time.perf_counter() - received.started
    return Durations(int(load * _NS), int(first * _NS), int(total * _NS))


def _ignored(members: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """Return a header that lists the members without effect and the reasons; empty if there are none."""
    shown = [f"{name}: {why}" for name, why in members.items() if name.isascii() and name.isprintable()]
    return [(IGNORED, "; ".join(shown)[:1000].encode())] if shown else []


def _lines(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _now() -> datetime:
    return datetime.now(UTC)

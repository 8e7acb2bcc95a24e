"""The calls of language models, by both clients, against events from memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import orjson
import pytest

from tidegate import AsyncClient, Client
from tidegate.client.errors import BadAnswer, from_answer
from tidegate.client.llm import ChatResult, Usage, read_chunk
from tidegate.kernel import errors

pytestmark = pytest.mark.unit

USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}


def event(delta: dict[str, Any], end: str | None = None, index: int = 0) -> str:
    choice = {"index": index, "delta": delta, "finish_reason": end}
    return "data: " + orjson.dumps({"id": "c1", "model": "m", "choices": [choice]}).decode()


STREAM = [
    ": queued 3",
    event({"role": "assistant", "content": None}),
    event({"content": "Good "}),
    event({"content": "day"}),
    event({}, "stop"),
    "data: " + orjson.dumps({"id": "c1", "choices": [], "usage": USAGE}).decode(),
    "data: [DONE]",
]


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """The events of a stream; ``closed``: the client has closed the response."""

    def __init__(self, lines: list[str]) -> None:
        self.lines = lines
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for line in self.lines:
            yield f"{line}\n\n".encode()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for line in self.lines:
            yield f"{line}\n\n".encode()

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


class Gateway:
    """Answers with ``lines`` if a stream is requested, else with ``document``. ``bodies``: the requests."""

    def __init__(self, lines: list[str], document: dict[str, Any] | None = None) -> None:
        self.lines = lines
        self.document = document or {}
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.stream = Body(lines)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(orjson.loads(request.content))
        self.paths.append(request.url.path)
        if self.bodies[-1].get("stream"):
            return httpx.Response(200, headers={"X-Request-Id": "r1"}, stream=self.stream)
        return httpx.Response(200, headers={"X-Request-Id": "r1"}, json=self.document)


def of_sync(gateway: Gateway, read: int | None) -> tuple[list[str], ChatResult, str]:
    with Client("http://gateway:1", transport=httpx.MockTransport(gateway)) as client:
        stream = client.chat("m", "Hello?", stream=True, max_tokens=2, seed=None)
        texts = []
        for chunk in stream:
            texts.append(chunk.text)
            if len(texts) == read:
                break
        stream.close()
        return texts, stream.so_far, stream.note


def of_async(gateway: Gateway, read: int | None) -> tuple[list[str], ChatResult, str]:
    async def main() -> tuple[list[str], ChatResult, str]:
        async with AsyncClient("http://gateway:1", transport=httpx.MockTransport(gateway)) as client:
            texts = []
            async with client.chat("m", "Hello?", stream=True, max_tokens=2, seed=None) as stream:
                async for chunk in stream:
                    texts.append(chunk.text)
                    if len(texts) == read:
                        break
            return texts, stream.so_far, stream.note

    return asyncio.run(main())


@pytest.mark.parametrize("chat", [of_sync, of_async])
def test_a_stream_is_chunks_and_in_the_end_a_result(chat: Callable[..., Any]) -> None:
    gateway = Gateway(STREAM)
    texts, result, note = chat(gateway, None)
    assert texts == ["", "Good ", "day", "", ""]
    assert (result.text, result.finish_reason, result.request_id) == ("Good day", "stop", "r1")
    assert result.usage == Usage(7, 2, 4)
    assert result.usage.total_tokens == 9
    assert note == "queued 3"
    (body,) = gateway.bodies
    assert body["messages"] == [{"role": "user", "content": "Hello?"}]
    assert body["max_tokens"] == 2
    assert "seed" not in body
    assert body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("chat", [of_sync, of_async])
@pytest.mark.parametrize("read", [1, 2])
def test_closing_a_stream_closes_the_response_and_keeps_the_part(chat: Callable[..., Any], read: int) -> None:
    gateway = Gateway(STREAM)
    texts, result, _ = chat(gateway, read)
    assert len(texts) == read
    assert result.text == "".join(texts)
    assert gateway.stream.closed


def test_a_stream_that_was_never_read_is_closed_too() -> None:
    gateway = Gateway(STREAM)
    with Client("http://gateway:1", transport=httpx.MockTransport(gateway)) as client:
        client.chat("m", "Hello?", stream=True).close()
    assert gateway.stream.closed


def test_an_answer_in_one_piece() -> None:
    message = {"role": "assistant", "content": "Good day"}
    document = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": USAGE}
    gateway = Gateway([], document)
    with Client("http://gateway:1", transport=httpx.MockTransport(gateway)) as client:
        found = client.chat("m", [{"role": "user", "content": "Hello?"}], temperature=0)
    assert (found.text, found.message, found.usage) == ("Good day", message, Usage(7, 2, 4))
    assert gateway.paths == ["/v1/chat/completions"]
    assert gateway.bodies[0]["temperature"] == 0
    assert "stream" not in gateway.bodies[0]


def test_completions_and_embeddings() -> None:
    data = [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}]
    gateway = Gateway([], {"choices": [{"index": 0, "text": " a time"}], "data": data})
    with Client("http://gateway:1", transport=httpx.MockTransport(gateway)) as client:
        assert client.complete("m", "Once upon").text == " a time"
        assert client.embed("m", ["a", "b"]).vectors.tolist() == [[1, 2], [3, 4]]
        gateway.document = {"data": [{}]}
        with pytest.raises(BadAnswer, match="no embeddings"):
            client.embed("m", "a")
    assert gateway.paths == ["/v1/completions", "/v1/embeddings", "/v1/embeddings"]
    assert gateway.bodies[1]["input"] == ["a", "b"]


def test_the_pieces_of_a_call_of_a_tool_are_put_together() -> None:
    lines = [
        event({"tool_calls": [{"index": 0, "id": "t1", "function": {"name": "add", "arguments": '{"a":'}}]}),
        event({"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}),
        event({}, "tool_calls"),
    ]
    _, result, _ = of_sync(Gateway(lines), None)
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert result.tool_calls == [{"id": "t1", "type": "function", "function": function}]


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ({"message": "Gone.", "type": "server_error", "code": "model_failed"}, errors.ModelFailed),
        ({"message": "Gone.", "type": "server_error"}, errors.ModelFailed),
        ({"message": "Gone.", "type": "tokens", "code": "rate_limit_exceeded"}, errors.TooMany),
        ({"message": "Gone.", "code": 503}, errors.Unavailable),
        ("Gone.", errors.ModelFailed),
    ],
)
def test_an_error_event_is_raised(told: Any, kind: type[errors.TidegateError]) -> None:
    with pytest.raises(kind, match=r"Gone\."):
        read_chunk("data: " + orjson.dumps({"error": told}).decode())


def test_an_answer_with_openais_error() -> None:
    told = {"error": {"message": "No model.", "type": "invalid_request_error", "code": "model_not_found"}}
    error = from_answer(404, {}, orjson.dumps(told))
    assert type(error) is errors.NotFound
    assert (error.message, error.reason) == ("No model.", "model_not_found")


@pytest.mark.parametrize("line", ["data: nonsense", "data: [1]"])
def test_a_malformed_event_is_a_bad_answer(line: str) -> None:
    with pytest.raises(BadAnswer):
        read_chunk(line)

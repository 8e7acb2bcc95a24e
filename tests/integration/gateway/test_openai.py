"""OpenAI's API at a gateway process, with an engine at the other end of the broker that each test plays."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest

from services.gateway.domain.feedback_ids import FeedbackIds
from tests.integration.gateway.process import make_table_with_feedback
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.llm import EVENTS, KV_TOKENS, META, SIGNATURE, LlmRequest, Resume
from tidegate.kernel.protocol.tensors import pack_strings, unpack_strings

pytestmark = pytest.mark.integration

CHAT = "/v1/chat/completions"
HELLO = {"model": "digits", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


@pytest.fixture(scope="module")
def table() -> Callable[..., dict[str, Any]]:
    return make_table_with_feedback


@pytest.fixture(scope="module")
def gateway_env(registry) -> dict[str, str]:
    required = {"TIDEGATE_AUTH": "required", "TIDEGATE_REGISTRY_URL": registry.url}
    return required | {"TIDEGATE_MAX_BODY_BYTES": "100000"}


@pytest.fixture(scope="module")
def gateway_route() -> dict[str, Any]:
    return {
        "format": "llm",
        "signature": SIGNATURE.model_dump(),
        "llm": {"context": 512, "adapters": ["pirate"], "slots": 2, "created": 7},
    }


@pytest.fixture
def client(client_with_token) -> httpx.AsyncClient:
    return client_with_token


class Engine:
    """The worker's end of requests: it reads them, and sends their chunks."""

    def __init__(self, peer, until) -> None:
        self._peer, self._until = peer, until
        peer.answer = lambda _: None
        self._chunks: dict[bytes, int] = {}

    async def asked(self, number: int = 0) -> tuple[envelope.Request, LlmRequest]:
        await self._until(lambda: len(self._peer.requests) > number)
        request = self._peer.requests[number]
        (text,) = unpack_strings(request.data[0])
        return request, LlmRequest.from_bytes(text)

    async def send(self, request: envelope.Request, *events: Any, **meta: Any) -> None:
        """Send events as one chunk."""
        raw = [event if isinstance(event, bytes) else orjson.dumps(event) for event in events]
        outputs = (envelope.tensor(EVENTS, "BYTES", (len(raw),)), envelope.tensor(META, "BYTES", (1,)))
        data: list[envelope.Buffer] = [pack_strings(raw), pack_strings([orjson.dumps(meta)])]
        seq = self._chunks.get(request.id, 0)
        self._chunks[request.id] = seq + 1
        key = envelope.result_key(outputs)
        frame = envelope.reply_frame(
            request.id, request.attempt, 0, key, data, status=envelope.CHUNK, seq=seq, wait_us=5, compute_us=7
        )
        await self.publish(frame)

    def forget(self, request: envelope.Request) -> None:
        """Number the chunks of a request from 0 again."""
        del self._chunks[request.id]

    async def end(self, request: envelope.Request) -> None:
        await self.publish(envelope.end_frame(request.id, request.attempt, self._chunks.get(request.id, 0)))

    async def publish(self, frame: bytes) -> None:
        (delivery, *_) = self._peer.deliveries
        await self._peer.connection.channel.publish(
            envelope.pack(envelope.REPLIES, [frame]), routing_key=delivery.reply_to
        )

    @property
    def cancelled(self) -> list[bytes]:
        return self._peer.cancelled


@pytest.fixture
def engine(worker, until) -> Engine:
    return Engine(worker, until)


def delta(text: str, **fields: Any) -> dict[str, Any]:
    return {"id": "c1", "model": "x.gguf", "choices": [{"index": 0, "delta": {"content": text}}], **fields}


async def read(client: httpx.AsyncClient, path: str, body: Any) -> tuple[httpx.Response, list[str]]:
    """Return a stream's head and its lines."""
    async with client.stream("POST", path, json=body) as answer:
        return answer, [line async for line in answer.aiter_lines() if line and line != ": keep-alive"]


async def test_a_stream(client, engine):
    reading = asyncio.create_task(read(client, CHAT, {**HELLO, "stream": True}))
    request, asked = await engine.asked()
    await engine.send(request, delta("a"), delta("b"), usage=[3, 2, 0])
    await engine.send(request, {**delta(""), "choices": [], "usage": {"total_tokens": 5}}, usage=[3, 2, 0])
    await engine.end(request)
    answer, (first, second, timing, done) = await reading
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [orjson.loads(e[6:])["choices"][0]["delta"]["content"] for e in (first, second)] == ["a", "b"]
    assert orjson.loads(first[6:])["model"] == "digits"
    facts = FeedbackIds("token").read(answer.headers["x-feedback-id"])
    assert facts is not None
    assert (facts.endpoint, facts.version, facts.assigned) == ("digits", "1", True)
    assert timing.startswith(": server-timing: decode;dur=")
    assert done == "data: [DONE]"
    assert (asked.path, asked.resume) == (CHAT, None)
    assert asked.body["stream_options"] == {"include_usage": True}
    assert asked.body["model"] == "digits"
    tokens = envelope.read_call_key(request.key).parameters[KV_TOKENS]
    assert tokens == 6 + 5


async def test_usage_on_request(client, engine):
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    reading = asyncio.create_task(read(client, CHAT, body))
    request, _ = await engine.asked()
    await engine.send(request, {**delta(""), "choices": [], "usage": {"total_tokens": 5}})
    await engine.end(request)
    _, (usage, *_) = await reading
    assert orjson.loads(usage[6:])["usage"] == {"total_tokens": 5}


async def test_a_whole_answer(client, engine):
    asking = asyncio.create_task(client.post("/v1/embeddings", json={"model": "digits:pirate", "input": "a"}))
    request, asked = await engine.asked()
    await engine.send(request, {"object": "list", "data": [], "model": "x.gguf"}, usage=[1, 0, 0])
    await engine.end(request)
    answer = await asking
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"object": "list", "data": [], "model": "digits:pirate"}
    assert "total;dur=" in answer.headers["server-timing"]
    assert FeedbackIds("token").read(answer.headers["x-feedback-id"]) is not None
    assert (asked.path, asked.body["model"]) == ("/v1/embeddings", "digits:pirate")


async def test_responses_have_named_events_and_no_done(client, engine):
    body = {"model": "digits", "input": "a", "stream": True}
    reading = asyncio.create_task(read(client, "/v1/responses", body))
    request, asked = await engine.asked()
    await engine.send(request, {"type": "response.created", "response": {"model": "x.gguf"}})
    await engine.end(request)
    _, found = await reading
    assert found[0] == "event: response.created"
    assert orjson.loads(found[1][6:])["response"]["model"] == "digits"
    assert "data: [DONE]" not in found
    assert "stream_options" not in asked.body


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_refuses(client, engine, stream):
    refusal = {"error": {"message": "too long", "type": "exceed_context_size_error", "code": 400}}
    for at in range(20):  # a stream without an answer for two seconds has begun with status 200
        asking = asyncio.create_task(client.post(CHAT, json={**HELLO, "stream": stream}))
        request, _ = await engine.asked(at)
        await engine.send(request, refusal, status=400)
        answer = await asking
        if answer.status_code != 200:
            break
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_an_error_after_the_first_event_is_an_event(client, engine):
    reading = asyncio.create_task(read(client, CHAT, {**HELLO, "stream": True}))
    request, _ = await engine.asked()
    await engine.send(request, delta("a"))
    await engine.publish(envelope.failure_frame(request.id, 0, "model_failed", "out of luck"))
    answer, (_, last) = await reading
    assert answer.status_code == 200
    assert orjson.loads(last[6:])["error"] == {
        "message": "out of luck", "type": "server_error", "param": None, "code": "model_failed",
    }  # fmt: skip


async def test_the_first_token_is_late(client, engine):
    answer = await client.post(CHAT, json={**HELLO, "stream": True}, headers={"X-Request-Timeout-Ms": "300"})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"


async def test_a_caller_that_leaves_cancels(client, engine, until):
    reading = asyncio.create_task(read(client, CHAT, {**HELLO, "stream": True}))
    request, _ = await engine.asked()
    await engine.send(request, delta("a"))
    reading.cancel()
    await until(lambda: set(engine.cancelled) == {request.id})  # a late chunk causes another cancel


async def test_a_caller_that_leaves_before_the_first_event_cancels(client, engine, until):
    asking = asyncio.create_task(client.post(CHAT, json=HELLO))
    request, _ = await engine.asked()
    asking.cancel()
    await until(lambda: set(engine.cancelled) == {request.id})  # a late chunk causes another cancel


async def test_comments_while_the_engine_is_silent(client, engine):
    body = {**HELLO, "stream": True}
    for headers, expected in (
        ({}, ": keep-alive"),
        ({"X-Tidegate-Queue": "on"}, ": x-tidegate-queue position=0 state=waking"),
    ):
        async with client.stream("POST", CHAT, json=body, headers=headers) as answer:
            reading = answer.aiter_lines()
            assert await anext(reading) == expected


def texts(found: list[str]) -> list[str]:
    """Return the texts of a stream's events."""
    events = [orjson.loads(line[6:]) for line in found if line.startswith("data: {")]
    return [event["choices"][0]["delta"]["content"] for event in events if event.get("choices")]


async def test_a_stream_survives_its_worker(client, engine):
    reading = asyncio.create_task(read(client, CHAT, {**HELLO, "stream": True}))
    first, _ = await engine.asked()
    await engine.send(first, delta("a", created=7), prompt_ids=[1, 2], ids=[3])
    await engine.send(first, delta("b", created=7), ids=[4])
    await engine.publish(envelope.failure_frame(first.id, 0, "worker_lost", "gone"))
    second, asked = await engine.asked(1)
    assert second.id != first.id
    assert asked.resume == Resume([1, 2], [3, 4], "ab", "c1", 7)
    await engine.send(second, delta("c", id="other", created=8), ids=[5], usage=[2, 3, 0])
    # The worker that gets the request next runs it, although the first chunks have been passed on.
    third = second._replace(attempt=1)
    engine.forget(second)
    await engine.send(third, delta("b"))
    fourth, asked = await engine.asked(2)
    assert asked.resume == Resume([1, 2], [3, 4, 5], "abc", "c1", 7)
    await engine.send(fourth, delta("d", id="other"), ids=[6])
    await engine.end(fourth)
    _, found = await reading
    assert texts(found) == ["a", "b", "c", "d"]
    assert {orjson.loads(line[6:])["id"] for line in found if line.startswith("data: {")} == {"c1"}
    assert found[-1] == "data: [DONE]"


async def test_a_stream_without_events_starts_again(client, engine):
    reading = asyncio.create_task(read(client, CHAT, {**HELLO, "stream": True, "tools": [{}]}))
    first, _ = await engine.asked()
    await engine.publish(envelope.failure_frame(first.id, 0, "worker_lost", "gone"))
    second, asked = await engine.asked(1)
    assert asked.resume is None
    await engine.send(second, delta("a"))
    await engine.end(second)
    _, found = await reading
    assert texts(found) == ["a"]


async def test_a_stream_that_cannot_continue_says_why(client, engine):
    reading = asyncio.create_task(read(client, CHAT, {**HELLO, "stream": True, "tools": [{}]}))
    first, _ = await engine.asked()
    await engine.send(first, delta("a"), prompt_ids=[1], ids=[2])
    await engine.publish(envelope.failure_frame(first.id, 0, "worker_lost", "gone"))
    _, (_, last) = await reading
    error = orjson.loads(last[6:])["error"]
    assert (error["code"], error["type"]) == ("worker_lost", "server_error")
    assert "cannot continue on another one, because it has tools" in error["message"]


async def test_a_request_that_loses_three_workers_fails(client, engine):
    asking = asyncio.create_task(client.post(CHAT, json=HELLO))
    for at in range(3):
        request, _ = await engine.asked(at)
        await engine.publish(envelope.failure_frame(request.id, 0, "worker_lost", "gone"))
    answer = await asking
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_lost")
    assert "3 workers were lost" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status", "code", "told"),
    [
        (b"{", 400, "bad_request", "is not JSON"),
        (b"[]", 400, "bad_request", "must be a JSON object"),
        (b"{}", 400, "bad_request", "'model' must be the name"),
        (b'{"model": "nothing"}', 404, "model_not_found", "unknown model: 'nothing'"),
        (b'{"model": "digits:parrot"}', 404, "model_not_found", "no adapter 'parrot'"),
        (b'{"model": "' + b"x" * 100_001, 413, "request_too_large", "larger than the limit of 100000 bytes"),
    ],
)
async def test_refusals(client, engine, body, status, code, told):
    answer = await client.post(CHAT, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert told in error["message"]
    assert answer.headers["x-request-id"]


async def test_another_format_of_model(client, engine, add_model):
    name = await add_model()
    answer = await client.post(CHAT, json={**HELLO, "model": name})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "not_a_language_model")


async def test_without_a_key(gateway):
    async with httpx.AsyncClient(base_url=gateway.url) as anybody:
        for method, path in (("POST", CHAT), ("GET", "/v1/models")):
            answer = await anybody.request(method, path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"


async def test_models(client, engine):
    found = (await client.get("/v1/models")).json()
    assert found["object"] == "list"
    assert [m["id"] for m in found["data"]] == ["digits", "digits:pirate"]
    assert found["data"][0] == {
        "id": "digits", "object": "model", "created": 7, "owned_by": "tidegate", "max_model_len": 512,
    }  # fmt: skip
    assert (await client.get("/v1/models/digits:pirate")).json()["parent"] == "digits"
    missing = await client.get("/v1/models/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")

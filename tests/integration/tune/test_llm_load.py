"""The load generator of ``tidegate bench`` against an HTTP server: what it counts, and when it ends."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.conftest import PATIENCE_S
from tidegate.tune.http_call import Target
from tidegate.tune.llm_load import LlmLoad, LlmLoadPlan
from tidegate.tune.measurement import GatewayAddress

pytestmark = pytest.mark.integration

Handler = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Target]:
    """Serve POSTs: ``handler`` gets the JSON body and writes the answer."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        )
        try:
            await handler(json.loads(await reader.readexactly(length)), writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield Target(GatewayAddress("127.0.0.1", port, False, ""), "/v1/chat/completions")


def head(
    writer: asyncio.StreamWriter, status: int = 200, *more: str, kind: str = "text/event-stream"
) -> None:
    writer.write("\r\n".join((f"HTTP/1.1 {status} X", f"Content-Type: {kind}", *more, "", "")).encode())


def piece(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write one chunk of a chunked body."""
    writer.write(b"%x\r\n%b\r\n" % (len(data), data))


def event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def token(text: str) -> bytes:
    return event({"choices": [{"delta": {"content": text}}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}})


async def answered(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    head(writer, 200, "Transfer-Encoding: chunked")
    stream = b": queued\n\n" + token("Good") + token(" day") + USAGE + b"data: [DONE]\n\n"
    for at in range(0, len(stream), 37):  # pieces are not events
        piece(writer, stream[at : at + 37])
    writer.write(b"0\r\n\r\n")


def body(number: int) -> bytes:
    return json.dumps({"number": number}).encode()


async def ran(target: Target, **fields: Any) -> LlmLoad:
    load = LlmLoad(LlmLoadPlan(target, body, **fields))
    await asyncio.wait_for(load.run(), PATIENCE_S)
    return load


async def test_a_closed_loop_sends_a_number_of_requests() -> None:
    async with serving(answered) as target:
        load = await ran(target, callers=3, requests=10, keep_text=True)
    figures = load.figures()
    assert (figures.answered, figures.failed, figures.cut) == (10, 0, 0)
    assert (figures.tokens, figures.prompt_tokens) == (30, 90)
    assert all(record.text == "Good day" for record in load.records)
    assert figures.first_token.percentiles[50] is not None


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    waiting = asyncio.Event()

    async def late(told: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if told["number"] == 4:
            waiting.set()  # the last one has come, while none was answered
        await waiting.wait()
        await answered(told, writer)

    async with serving(late) as target:
        load = await ran(target, rate=200.0, requests=5)
    assert load.figures().answered == 5


@pytest.mark.parametrize(
    ("status", "written", "problem"),
    [
        (404, b'{"error": {"message": "No such model."}}', "404: No such model."),
        (429, b'{"error": "Slow down."}', "429: Slow down."),
        (502, b"bad gateway", "502: bad gateway"),
        (200, token("Go") + event({"error": {"message": "It ended."}}), "It ended."),
        (200, token("Go"), "the stream ended without [DONE]"),
    ],
)
async def test_a_failure_is_counted_with_its_reason(status: int, written: bytes, problem: str) -> None:
    async def failing(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        head(writer, status, kind="text/event-stream" if status == 200 else "application/json")
        writer.write(written)

    async with serving(failing) as target:
        load = await ran(target, callers=1, requests=2)
    assert load.figures().problems == {problem: 2}


async def test_a_broken_connection_is_a_failure() -> None:
    async def broken(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        head(writer, 200, "Transfer-Encoding: chunked")
        piece(writer, token("Go"))
        await writer.drain()
        writer.transport.abort()

    async with serving(broken) as target:
        load = await ran(target, callers=1, requests=1)
    (problem,) = load.figures().problems
    assert "connection broke" in problem


async def test_the_end_of_the_time_cuts_what_is_unanswered() -> None:
    closed = asyncio.Event()

    async def endless(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        head(writer)
        try:
            while True:
                writer.write(token("x"))
                await writer.drain()
                await asyncio.sleep(0.01)
        finally:
            closed.set()

    async with serving(endless) as target:
        load = LlmLoad(LlmLoadPlan(target, body, callers=1, seconds=PATIENCE_S))
        running = asyncio.create_task(load.run())
        end = time.monotonic() + PATIENCE_S
        while not (load.records and len(load.records[0].token_times) > 3):
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        load.stop()
        await asyncio.wait_for(running, PATIENCE_S)
        await asyncio.wait_for(closed.wait(), PATIENCE_S)
    figures = load.figures()
    assert (figures.answered, figures.failed, figures.cut) == (0, 0, 1)
    assert figures.tokens > 3


async def test_an_answer_in_one_piece_has_no_first_token() -> None:
    async def whole(_: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        head(writer, 200, "Content-Length: 15", kind="application/json")
        writer.write(b'{"outputs": []}')

    async with serving(whole) as target:
        load = await ran(target, callers=2, requests=4)
    figures = load.figures()
    assert (figures.answered, figures.first_token.mean) == (4, None)
    assert figures.whole.mean is not None

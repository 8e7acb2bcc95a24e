"""Many open streams of language models in one gateway process, and the CPU time of each event."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import orjson
import psutil
import pytest

from tests.conftest import Figure
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.llm import EVENTS, META, SIGNATURE
from tidegate.kernel.protocol.tensors import pack_strings

pytestmark = pytest.mark.integration

# `LLM_STREAMS=1000` measures what the page on performance has.
STREAMS = int(os.environ.get("LLM_STREAMS", "100"))
EVENTS_EACH = int(os.environ.get("LLM_EVENTS", "40"))
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
BODY = orjson.dumps(
    {"model": "digits", "stream": True, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 99}
)


@pytest.fixture(scope="module")
def gateway_env() -> dict[str, str]:
    return {}


@pytest.fixture(scope="module")
def gateway_route() -> dict[str, Any]:
    return {"format": "llm", "signature": SIGNATURE.model_dump()}


async def read_stream(port: int) -> bytes:
    """Open a stream, and return everything that comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HEAD + b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY))
    found = bytearray()
    while data := await reader.read(65536):
        found += data
    writer.close()
    return bytes(found)


def chunk(request: envelope.Request, seq: int) -> bytes:
    event = orjson.dumps(
        {
            "choices": [{"finish_reason": None, "index": 0, "delta": {"content": f" word{seq}"}}],
            "created": 1795968000,
            "id": "chatcmpl-0123456789abcdefghijklmnopqrstuv",
            "model": "digits",
            "system_fingerprint": "b1-0000000",
            "object": "chat.completion.chunk",
        }
    )
    meta = orjson.dumps({"usage": [31, seq + 1, 0], "ids": [seq]} | ({} if seq else {"prompt_ids": [1] * 31}))
    outputs = (envelope.tensor(EVENTS, "BYTES", (1,)), envelope.tensor(META, "BYTES", (1,)))
    data: list[envelope.Buffer] = [pack_strings([event]), pack_strings([meta])]
    key = envelope.result_key(outputs)
    return envelope.reply_frame(request.id, 0, 0, key, data, status=envelope.CHUNK, seq=seq)


async def test_many_streams(gateway, worker, until, figure: Figure):
    worker.answer = lambda _: None
    readers = [asyncio.create_task(read_stream(gateway.port)) for _ in range(STREAMS)]
    await until(lambda: len(worker.requests) == STREAMS)
    reply_to = worker.deliveries[0].reply_to
    process = psutil.Process(gateway.process.pid)
    before, memory = process.cpu_times(), process.memory_info().rss
    for seq in range(EVENTS_EACH):
        for request in worker.requests:
            # A worker sends each token's event in an envelope of its own.
            body = envelope.pack(envelope.REPLIES, [chunk(request, seq)])
            worker.connection.channel.send(body, routing_key=reply_to)
        await asyncio.sleep(0.01)
    for request in worker.requests:
        end = envelope.end_frame(request.id, 0, EVENTS_EACH)
        worker.connection.channel.send(envelope.pack(envelope.REPLIES, [end]), routing_key=reply_to)
    found = await asyncio.gather(*readers)
    after = process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    for answer in found:
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.count(b"data: {") == EVENTS_EACH
        assert answer.count(b"data: [DONE]") == 1
    count = STREAMS * EVENTS_EACH
    figure(
        f"{STREAMS} streams of {EVENTS_EACH} events in one gateway: {spent / count * 1e6:.0f} us of CPU per "
        f"event, {(process.memory_info().rss - memory) / STREAMS / 1024:.0f} KiB more memory per stream"
    )

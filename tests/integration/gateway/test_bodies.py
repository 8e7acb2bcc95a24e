"""Large bodies: received in place, refused while they come in, and within the memory limit."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import PATIENCE_S, Figure
from tests.integration.gateway.raw_http import pipelined
from tidegate.kernel.blobs.store import new_key
from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.claim import read_claim, write_claim
from tidegate.kernel.protocol.envelope import Reply, Request, tensor

pytestmark = pytest.mark.integration

MIB = 2**20
MAX_BODY, INFLIGHT, CLAIM_ABOVE = 32 * MIB, 64 * MIB, 4 * MIB
INFER = "/v2/models/digits/infer"


@pytest.fixture(scope="module")
def gateway_env() -> dict[str, str]:
    return {
        "TIDEGATE_MAX_BODY_BYTES": str(MAX_BODY),
        "TIDEGATE_MAX_JSON_BYTES": str(MIB),
        "TIDEGATE_MAX_INFLIGHT_BYTES": str(INFLIGHT),
        "TIDEGATE_CLAIM_ABOVE_BYTES": str(CLAIM_ABOVE),
    }


@pytest.fixture(scope="module")
def gateway_route() -> dict:
    x = {"name": "x", "datatype": "UINT8", "shape": [-1]}
    return {"signature": {"inputs": [x], "outputs": [x | {"name": "y"}], "max_batch_size": 0}}


@pytest.fixture
def echoing(gateway, worker) -> None:
    """The worker returns its input, from the message or from the blob store."""

    blobs = gateway.state / "data" / "blobs"

    def echo(request: Request) -> bytes:
        data = request.data
        if request.flags & envelope.CLAIM:
            data = [(blobs / read_claim(data).key).read_bytes()]
        key = envelope.result_key((tensor("y", "UINT8", (len(data[0]),)),))
        if claimed := len(data[0]) > CLAIM_ABOVE:
            blob = new_key(time.time() + 60)
            (blobs / blob).parent.mkdir(parents=True, exist_ok=True)
            (blobs / blob).write_bytes(data[0])
            data = [write_claim(blob, data)]
        reply = Reply(request.id, envelope.OK, request.attempt, 0, 0, 1, 2, 1, key, data, claimed)
        return b"".join(envelope.reply_pieces(reply))

    worker.answer = echo


def body_of(data: bytes) -> tuple[bytes, dict[str, str]]:
    parameters = {"parameters": {"binary_data_size": len(data)}}
    x = {"name": "x", "datatype": "UINT8", "shape": [len(data)]}
    head = json.dumps({"inputs": [x | parameters], "parameters": {"binary_data_output": True}}).encode()
    return head + data, {"Inference-Header-Content-Length": str(len(head))}


def tensor_of(answer: httpx.Response) -> bytes:
    assert answer.status_code == 200, answer.text
    return answer.content[int(answer.headers["inference-header-content-length"]) :]


@pytest.mark.parametrize("size", [60_000, 100_000, MIB, MIB + 1, CLAIM_ABOVE, CLAIM_ABOVE + 1, 20 * MIB])
async def test_bodies_come_back_unchanged(client, echoing, size):
    """In place or not, in a message or as a claim. The connection can be used again."""
    for data in (os.urandom(size), os.urandom(size), b"small"):
        content, headers = body_of(data)
        assert tensor_of(await client.post(INFER, content=content, headers=headers)) == data


async def test_in_chunks_of_unknown_size(client, echoing):
    data = os.urandom(7 * MIB)
    content, headers = body_of(data)

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(content), 100_000):
            yield content[at : at + 100_000]

    assert tensor_of(await client.post(INFER, content=chunks(), headers=headers)) == data


@pytest.mark.parametrize("size", [10, 30_000, 64_000, 66_000])
async def test_in_small_pieces(gateway, echoing, size):
    """A slow connection brings small pieces; the second comes while the first is checked."""
    data = os.urandom(size)
    content, headers = body_of(data)
    lines = [*map(": ".join, headers.items()), "Connection: close"]
    async with Caller(gateway.port) as caller:
        await caller.head(f"Content-Length: {len(content)}", *lines)
        for at in range(0, len(content), len(content) // 3):
            await caller.send([content[at : at + len(content) // 3]])
            await asyncio.sleep(0.01)
        raw = await caller._reader.read()
    assert raw.startswith(b"HTTP/1.1 200 ")
    assert raw.endswith(data)


async def test_memory_of_interrupted_uploads_is_released(gateway, client, echoing, until):
    """Small and large, twice the limit in all."""

    async def break_off(size: int) -> None:
        async with Caller(gateway.port) as caller:
            await caller.head(f"Content-Length: {size + 1}")
            await caller.send([bytes(size)])

    for size, times in ((60_000, 60), (MIB, 4), (4 * MIB, 1)):
        for _ in range(2 * INFLIGHT // (size * times)):
            await asyncio.gather(*(break_off(size) for _ in range(times)))
    content, headers = body_of(os.urandom(25 * MIB))
    await until(lambda: _is_answered(client, content, headers))


async def test_compressed(client, echoing):
    data = bytes(10 * MIB)
    content, headers = body_of(data)
    headers["Content-Encoding"] = "gzip"
    packed = gzip.compress(content, 1)
    assert tensor_of(await client.post(INFER, content=packed, headers=headers)) == data
    cut_off = await client.post(INFER, content=packed[:-9], headers=headers)
    assert (cut_off.status_code, "is incomplete" in cut_off.json()["error"]) == (400, True)
    bomb, headers = body_of(bytes(MAX_BODY))
    headers["Content-Encoding"] = "gzip"
    answer = await client.post(INFER, content=gzip.compress(bomb, 1), headers=headers)
    assert (answer.status_code, answer.json()["reason"]) == (413, "payload_too_large")


async def test_compressed_text_counts_by_its_decompressed_size(client, until):
    """Decompressed bodies stay until their answer, so the budget must count their full size."""
    text = gzip.compress(json.dumps({"x": [1] * (MIB // 2 - 10)}, separators=(",", ":")).encode())
    fitting = INFLIGHT // MIB

    async def ask() -> tuple[int, str]:
        headers = {"Content-Encoding": "gzip", "X-Request-Timeout-Ms": "120000"}
        answer = await client.post("/v2/models/digits/generate_stream", content=text, headers=headers)
        return answer.status_code, answer.json()["reason"]

    asked = [asyncio.create_task(ask()) for _ in range(fitting + 6)]
    try:
        await until(lambda: sum(each.done() for each in asked) >= 5)
        assert await ask() == (503, "overloaded"), "no worker answers, so the memory stays in use"
        refused = [each.result() for each in asked if each.done()]
        assert set(refused) == {(503, "overloaded")}
        assert len(refused) in range(5, 8)
    finally:
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def test_json_has_a_lower_limit(client):
    text = json.dumps({"inputs": [{"name": "x", "datatype": "UINT8", "shape": [1], "data": [1] * MIB}]})
    answer = await client.post(INFER, content=text)
    assert (answer.status_code, "binary data" in answer.json()["error"]) == (413, True)


class Caller:
    """A raw connection on which a test sends bytes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.sent = 0

    async def __aenter__(self) -> Caller:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()

    async def head(self, *lines: str) -> None:
        self._writer.write(
            "\r\n".join([f"POST {INFER} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()
        )
        await self._writer.drain()

    async def send(self, pieces: Iterable[bytes]) -> None:
        """Send until all is sent or the server accepts no more."""
        try:
            for piece in pieces:
                self._writer.write(piece)
                await self._writer.drain()
                self.sent += len(piece)
        except ConnectionError:
            pass

    async def answer(self, timeout_s: float = PATIENCE_S) -> tuple[int, dict]:
        """Return status and JSON, read to the end of the connection."""
        async with asyncio.timeout(timeout_s):
            raw = await self._reader.read()
        head, _, body = raw.partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)


def chunked(total: int) -> Iterable[bytes]:
    for _ in range(total // 65536):
        yield b"10000\r\n" + bytes(65536) + b"\r\n"
    yield b"0\r\n\r\n"


async def test_refused_by_its_headers(gateway):
    """Before any byte of the body, with and without `Expect: 100-continue`."""
    async with Caller(gateway.port) as asking:
        await asking.head(f"Content-Length: {300 * MIB}", "Expect: 100-continue")
        status, told = await asking.answer()
        assert (status, told["reason"]) == (413, "payload_too_large")
    async with Caller(gateway.port) as sending:
        await sending.head(f"Content-Length: {300 * MIB}")
        sender = asyncio.create_task(sending.send([bytes(65536)] * (300 * 16)))
        assert (await sending.answer())[0] == 413
        sender.cancel()
    async with Caller(gateway.port) as allowed:
        await allowed.head("Content-Length: 2", "Expect: 100-continue")
        assert b" 100 " in await allowed._reader.readline()


async def test_refused_while_it_streams_in(gateway):
    async with Caller(gateway.port) as caller:
        await caller.head("Transfer-Encoding: chunked")
        sender = asyncio.create_task(caller.send(chunked(300 * MIB)))
        status, told = await caller.answer()
        assert (status, told["reason"]) == (413, "payload_too_large")
        assert told["error"].startswith(f"the body is larger than the limit of {MAX_BODY} bytes")
        sender.cancel()


async def test_a_pipelined_body_has_the_same_limits(gateway, worker):
    """It arrives while another request is in flight, so the ASGI fallback serves it."""
    worker.answer = lambda _: None
    content, headers = body_of(b"first")
    async with Caller(gateway.port) as caller:
        await caller.head(
            f"Content-Length: {len(content)}", "X-Request-Timeout-Ms: 500", *map(": ".join, headers.items())
        )
        await caller.send([content])
        await caller.head(f"Content-Length: {300 * MIB}", "Connection: close")
        async with asyncio.timeout(PATIENCE_S):
            raw = await caller._reader.read()
    assert (b" 504 " in raw, b" 413 " in raw) == (True, True)


async def test_pipelined_requests_are_answered_before_bad_input(gateway, echoing):
    """The first takes the hot path, the others the fallback, and the rest is not HTTP."""
    content, headers = body_of(b"small")
    raw = await pipelined(gateway.port, INFER, [content] * 50, headers, b"nonsense\r\n\r\n")
    assert (raw.count(b"HTTP/1.1 200 "), raw.count(b"HTTP/1.1 400 ")) == (50, 1)
    assert raw.rpartition(b"HTTP/1.1 ")[2].startswith(b"400 ")


class Watch:
    """The growth of a process's resident memory during the block, at its peak, in bytes."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self.most = self._process.memory_info().rss

    async def __aenter__(self) -> Watch:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            self.most = max(self.most, self._process.memory_info().rss)
            await asyncio.sleep(0.005)

    @property
    def grown(self) -> int:
        return self.most - self.before


# The limit in the gateway's README: the bodies in memory, one more in progress, and the process.
BOUND = INFLIGHT + MAX_BODY + 16 * MIB


@pytest.mark.parametrize("way", ["chunked", "declared", "declared too large"])
async def test_twenty_clients_with_large_bodies_have_a_bound(gateway, worker, way, figure: Figure):
    """The model answers none of them, so all accepted bodies stay in memory."""
    worker.answer = lambda _: None
    content, headers = body_of(bytes(MAX_BODY - 200))
    lines = [f"{name}: {value}" for name, value in headers.items()] + ["X-Request-Timeout-Ms: 3000"]

    async def push() -> int:
        async with Caller(gateway.port) as caller:
            if way == "chunked":
                await caller.head("Transfer-Encoding: chunked")
                pieces = chunked(300 * MIB)
            elif way == "declared":
                await caller.head(f"Content-Length: {len(content)}", "Connection: close", *lines)
                pieces = (content[at : at + 65536] for at in range(0, len(content), 65536))
            else:
                await caller.head(f"Content-Length: {300 * MIB}")
                pieces = iter([bytes(65536)] * (300 * 16))
            sender = asyncio.create_task(caller.send(pieces))
            try:
                status, _ = await caller.answer(PATIENCE_S)
            finally:
                sender.cancel()
            return status

    async with Watch(gateway.process.pid) as watch:
        statuses = await asyncio.gather(*(push() for _ in range(20)))
    figure(f"20 large bodies at once, {way}: the gateway grew by {watch.grown / MIB:.0f} MiB")
    assert watch.grown < BOUND, f"{watch.grown / MIB:.0f} MiB"
    expected = {"chunked": {413, 503}, "declared": {503, 504}, "declared too large": {413}}[way]
    assert set(statuses) <= expected, statuses


async def test_overload_says_when_to_come_back(gateway, client, echoing, until):
    """Stalled uploads hold only the bytes that they sent. Small requests find room, large ones get 503."""
    step = 20 * MIB
    async with Caller(gateway.port) as one, Caller(gateway.port) as two, Caller(gateway.port) as three:
        for caller in (one, two, three):
            await caller.head(f"Content-Length: {step + 1000}")
            await caller.send([bytes(65536)] * (step // 65536))
        status, told = await asyncio.wait_for(three.answer(), PATIENCE_S)
        assert (status, told["reason"]) == (503, "overloaded")
        content, headers = body_of(bytes(25 * MIB))
        refused = await client.post(INFER, content=content, headers=headers)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        content, headers = body_of(b"small")
        assert tensor_of(await client.post(INFER, content=content, headers=headers)) == b"small"
    content, headers = body_of(os.urandom(25 * MIB))
    await until(lambda: _is_answered(client, content, headers), "what was given up is free again")


async def test_unread_answers_are_bounded(gateway, worker, client, echoing, until):
    """Large answers wait for memory in the blob store, up to their deadline; small ones pass."""
    content, headers = body_of(bytes(20 * MIB))
    lines = [f"{name}: {value}" for name, value in headers.items()] + ["X-Request-Timeout-Ms: 2000"]
    callers = [Caller(gateway.port) for _ in range(12)]
    async with Watch(gateway.process.pid) as watch:
        try:
            for caller in callers:
                await caller.__aenter__()
                await caller.head(f"Content-Length: {len(content)}", *lines)
                await caller.send([content])
                caller._reader._transport.pause_reading()  # type: ignore[attr-defined]

            await asyncio.sleep(2)
            small, headers = body_of(b"x")
            assert tensor_of(await client.post(INFER, content=small, headers=headers)) == b"x"
        finally:
            for caller in callers:
                await caller.__aexit__()
    assert watch.grown < INFLIGHT + BOUND, f"{watch.grown / MIB:.0f} MiB"
    large, headers = body_of(os.urandom(20 * MIB))
    await until(lambda: _is_answered(client, large, headers), "what was given up is free again")


async def _is_answered(client: httpx.AsyncClient, content: bytes, headers: dict[str, str]) -> bool:
    return (await client.post(INFER, content=content, headers=headers)).status_code == 200


async def test_no_blob_is_left(gateway, until):
    await until(lambda: not [p for p in Path(gateway.state, "data", "blobs").glob("*/*") if p.is_file()])


async def test_other_routes_accept_only_short_bodies(client):
    """The budget does not count these bodies, so each connection could hold one."""
    long = b'{"ready": false, "x": "' + b"x" * 65_536 + b'"}'
    answer = await client.post("/v2/repository/index", content=long)
    assert answer.status_code == 413
    assert (await client.post("/v2/repository/index", content=b"{}")).status_code == 200

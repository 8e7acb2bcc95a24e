"""What one hostile gRPC client can do to the gateway: before it shows a credential, and with one."""

from __future__ import annotations

import asyncio
import gzip
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as stubs

from tests.conftest import PATIENCE_S
from tests.integration.gateway import raw_http2 as h2
from tests.integration.gateway.raw_http2 import Raw, frame, message

pytestmark = pytest.mark.integration

MB = 2**20
BUDGET, BODY, CONNECTIONS = 64 * MB, 40 * MB, 64
# How much a process may grow although it keeps nothing.
SLACK = 24 * MB
UNAUTHENTICATED, INVALID, EXHAUSTED, UNAVAILABLE = "16", "3", "8", "14"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.fixture(scope="module")
def gateway_env(registry) -> dict[str, str]:
    return {
        "TIDEGATE_AUTH": "required",
        "TIDEGATE_REGISTRY_URL": registry.url,
        "TIDEGATE_MAX_BODY_BYTES": str(BODY),
        "TIDEGATE_MAX_INFLIGHT_BYTES": str(BUDGET),
        "TIDEGATE_MAX_GRPC_CONNECTIONS": str(CONNECTIONS),
    }


@pytest.fixture
async def key(registry, gateway, worker, until) -> str:
    """A key that the gateway knows."""
    found: str = registry.key()["key"]
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:

        async def known() -> bool:
            try:
                await ask(channel, found)
            except grpc.aio.AioRpcError:
                return False
            return True

        await until(known, "the key")
    return found


@pytest.fixture
async def connect(gateway) -> AsyncIterator[Callable[[], Any]]:
    """``await connect()`` opens one more raw connection."""
    opened: list[Raw] = []

    async def one() -> Raw:
        opened.append(await Raw().open(gateway.grpc_port))
        return opened[-1]

    yield one
    await asyncio.gather(*(raw.close() for raw in opened))


def request() -> Any:
    made = pb.ModelInferRequest(model_name="digits")
    made.inputs.add(name="x", datatype="FP32", shape=[1, 2])
    made.raw_input_contents.append(struct.pack("<2f", 1, 2))
    return made


async def ask(channel: Any, key: str, **given: Any) -> Any:
    stub = stubs.GRPCInferenceServiceStub(channel)
    return await stub.ModelInfer(
        request(), metadata=(("authorization", f"Bearer {key}"),), timeout=PATIENCE_S, **given
    )


def credential(key: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {key}")]


def log_of(gateway: Any) -> str:
    found: str = (gateway.state / "log").read_text()
    return found


class Growth:
    """The growth of the process's memory."""

    def __init__(self, gateway: Any) -> None:
        self._process = psutil.Process(gateway.process.pid)
        self._before = self._process.memory_info().rss
        self.peak = 0

    async def __aenter__(self) -> Growth:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._look()
        self._task.cancel()

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss - self._before)

    async def _watch(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("shown", [[], credential("nonsense"), credential("tg_0_0")])
@pytest.mark.parametrize("path", [h2.INFER, STREAM])
async def test_an_unknown_client_is_refused_by_its_headers_and_nothing_is_kept(
    gateway, key, connect, shown, path
):
    """Three connections with 249 of 250 MB each grew the process by 753 MB."""
    async with Growth(gateway) as growth:
        clients = [await connect() for _ in range(3)]
        for client in clients:
            client.send(client.headers(1, path, shown))
        await asyncio.gather(*(client.upload(1, 30 * MB, declared=BODY) for client in clients))
        answers = [await client.answer(1) for client in clients]
    assert {answer["grpc-status"] for answer in answers} == {UNAUTHENTICATED}
    assert growth.peak < SLACK


@pytest.mark.parametrize("path", [h2.INFER, STREAM])
async def test_messages_count_against_the_budget_from_their_first_byte(gateway, key, connect, path):
    async with Growth(gateway) as growth:
        clients = [await connect() for _ in range(6)]
        for client in clients:
            client.send(client.headers(1, path, credential(key)))
        sent = await asyncio.gather(*(client.upload(1, 38 * MB, declared=39 * MB) for client in clients))
    refused = [await client.answer(1) for client in clients if client.ended(1)]
    assert refused
    assert {(told["grpc-status"], told["reason"]) for told in refused} == {(UNAVAILABLE, "overloaded")}
    assert all(told["retry-after"] == "1" for told in refused)
    assert growth.peak < BUDGET + SLACK, sent
    # A small message finds room beside them. Once they have ended, all memory is free.
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        await ask(channel, key)
        await asyncio.gather(*(client.close() for client in clients))
        big = request()
        big.raw_input_contents[0] = bytes(39 * MB)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stubs.GRPCInferenceServiceStub(channel).ModelInfer(
                big, metadata=(("authorization", f"Bearer {key}"),), timeout=PATIENCE_S
            )
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (
            "the message was read completely and checked"
        )


async def test_a_message_over_the_limit_is_refused_at_its_first_bytes(gateway, key, connect):
    client = await connect()
    client.send(client.headers(1, more=credential(key)), frame(h2.DATA, 0, 1, message(b"x", BODY + MB)))
    told = await client.answer(1)
    assert (told["grpc-status"], told["reason"]) == (EXHAUSTED, "payload_too_large")


@pytest.mark.parametrize("path", [h2.INFER, STREAM])
@pytest.mark.parametrize("data", [b"\xff" * 20, b"\x0a\x05ab", b"\x0a\xff\xff\xff\x7f" + bytes(70_000)])
async def test_malformed_protobuf_is_an_invalid_argument_and_no_traceback(gateway, key, connect, path, data):
    client = await connect()
    body = message(data)
    frames = [frame(h2.DATA, 0, 1, body[at : at + 16_384]) for at in range(0, len(body), 16_384)]
    client.send(client.headers(1, path, credential(key)), *frames, frame(h2.DATA, h2.END_STREAM, 1))
    told = await client.answer(1)
    assert (told["grpc-status"], told["reason"]) == (INVALID, "bad_request")
    assert "ModelInferRequest" in told["grpc-message"]
    assert "Traceback" not in log_of(gateway)


@pytest.mark.parametrize("tag", [b"\x2a\x00", b"\x32\x00", b"\x3a\x00", b"\x22\x00"])
async def test_a_message_of_nothing_but_empty_fields_is_not_parsed(gateway, key, connect, tag):
    """4 MB of empty inputs are 185 MB once parsed."""
    client = await connect()
    body = message(tag * (8 * MB // 2))
    client.send(client.headers(1, more=credential(key)))
    async with Growth(gateway) as growth:
        for at in range(0, len(body), 16_384):
            client.send(frame(h2.DATA, 0, 1, body[at : at + 16_384]))
            if at % MB == 0:
                await client.writer.drain()
        told = await client.answer(1)
    assert (told["grpc-status"], "more than 4096" in told["grpc-message"]) == (INVALID, True)
    assert growth.peak < 8 * MB + SLACK


async def test_compressed_messages_are_accepted_and_bombs_are_not(gateway, key, connect):
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
            answer = await ask(channel, key, compression=compression)
            assert len(answer.raw_output_contents) == 1
    bomb = gzip.compress(bytes(60 * MB))
    client = await connect()
    client.send(client.headers(1, more=[*credential(key), ("grpc-encoding", "gzip")]))
    body = b"\1" + message(bomb)[1:]
    async with Growth(gateway) as growth:
        for at in range(0, len(body), 16_384):
            client.send(frame(h2.DATA, 0, 1, body[at : at + 16_384]))
        told = await client.answer(1)
    assert told["grpc-status"] == EXHAUSTED
    assert growth.peak < BODY + SLACK
    for broken in (b"no gzip", bomb[: len(bomb) // 2]):
        client.send(
            client.headers(
                3 if broken == b"no gzip" else 5, more=[*credential(key), ("grpc-encoding", "gzip")]
            ),
            *(
                frame(
                    h2.DATA,
                    0,
                    3 if broken == b"no gzip" else 5,
                    (b"\1" + message(broken)[1:])[at : at + 16_384],
                )
                for at in range(0, len(broken) + 5, 16_384)
            ),
        )
    assert {(await client.answer(stream))["grpc-status"] for stream in (3, 5)} == {INVALID}


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (30 * frame(h2.PING, 0, 0, bytes(8)), b"too_many_pings"),
        (5000 * frame(h2.SETTINGS, 0, 0), b"the client sends too many frames"),
        (5000 * frame(h2.DATA, 0, 1), b"the client sent data for stream 1, which is not open"),
        (5000 * frame(h2.PRIORITY, 0, 1, bytes(5)), b"the client sends too many frames"),
        (
            frame(h2.HEADERS, 0, 1, b"\x82") + 3 * frame(h2.CONTINUATION, 0, 1, b"a" * 9000),
            b"the header block has more",
        ),
        (
            frame(h2.HEADERS, 0, 1, b"\x82") + 5000 * frame(h2.CONTINUATION, 0, 1),
            b"the client sends too many frames",
        ),
        (frame(h2.HEADERS, h2.END_HEADERS, 1, b"\x82" * 101), b"the call has more than 100 header fields"),
        (frame(h2.HEADERS, h2.END_HEADERS, 1, b"\xbe"), b"unreadable header block"),
        (b"\x00\x40\x01" + bytes(6), b"a frame of 16385 bytes"),
        (frame(h2.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), b"the window has more than"),
    ],
)
async def test_a_connection_that_asks_for_too_much_ends(gateway, key, connect, sent, words):
    client = await connect()
    client.send(sent)
    await client.until(lambda: client.goaway() is not None)
    assert client.goaway()[2].startswith(words)
    async with asyncio.timeout(PATIENCE_S):
        await client.closed.wait()


async def test_calls_that_are_cancelled_as_soon_as_they_begin(gateway, key, connect, worker):
    """HTTP/2 rapid reset: each call costs the gateway work, and its client nothing."""
    client = await connect()
    body = message(request().SerializeToString())
    for stream in range(1, 2001, 2):
        reset = frame(h2.RST_STREAM, 0, stream, struct.pack(">I", 8))
        client.send(client.headers(stream, more=credential(key)), frame(h2.DATA, 0, stream, body), reset)
    await client.until(lambda: client.goaway() is not None)
    assert client.goaway()[1:] == (11, b"the client cancels too many calls")


async def test_idle_connections_make_room_for_new_ones(gateway, key):
    silent = [await asyncio.open_connection("127.0.0.1", gateway.grpc_port) for _ in range(CONNECTIONS + 40)]
    held = await Raw().open(gateway.grpc_port)
    held.send(held.headers(1, more=credential(key)))  # a long call keeps its connection
    silent += [await asyncio.open_connection("127.0.0.1", gateway.grpc_port) for _ in range(CONNECTIONS + 40)]
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        for _ in range(3):
            await ask(channel, key)
    held.send(frame(h2.DATA, h2.END_STREAM, 1, message(request().SerializeToString())))
    assert (await held.answer(1))["grpc-status"] == "0"
    await held.close()
    for _, writer in silent:
        writer.close()


async def test_calls_without_a_credential_cannot_crowd_each_other_out(gateway, key, connect):
    """The oldest make room: 600 watches are more than the limit."""
    clients = [await connect() for _ in range(4)]
    for client in clients:
        for stream in range(1, 301, 2):
            body = frame(h2.DATA, h2.END_STREAM, stream, message(b""))
            client.send(client.headers(stream, h2.WATCH), body)
        await client.writer.drain()
    await clients[0].until(lambda: clients[0].ended(1))
    assert (await clients[0].answer(1))["grpc-status"] == UNAVAILABLE
    async with grpc.aio.insecure_channel(gateway.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        await ask(channel, key)


async def test_requests_that_a_browser_page_could_send_are_refused(gateway, key, connect):
    client = await connect()
    fields = [(":method", "POST"), (":scheme", "http"), (":path", h2.INFER), ("content-type", "text/plain")]
    client.send(frame(h2.HEADERS, 5, 1, client._encoder.encode(fields)))
    client.send(frame(h2.HEADERS, 5, 3, client._encoder.encode([(":method", "OPTIONS"), *fields[1:]])))
    assert (await client.answer(1))[":status"] == "415"
    assert (await client.answer(3))[":status"] == "405"
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.grpc_port)
    writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"this port accepts only gRPC" in await reader.read()
    writer.close()


async def test_a_request_id_that_is_not_text_is_not_sent_back(gateway, key, connect):
    client = await connect()
    body = message(request().SerializeToString())
    sent = frame(h2.DATA, h2.END_STREAM, 1, body)
    client.send(client.headers(1, more=[*credential(key), ("x-request-id", "a\r\nb: c")]), sent)
    told = await client.answer(1)
    assert told["grpc-status"] == "0"
    assert len(told["x-request-id"]) == 16, "the gateway made a new id"

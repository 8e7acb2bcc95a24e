"""The gRPC connection: no input makes it raise, and it releases all memory that it counted."""

from __future__ import annotations

import asyncio
import gzip
import os
import struct
import zlib
from typing import Any

import pytest
from grpc_health.v1 import health_pb2
from hpack import Encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.grpc import connection, server
from services.gateway.api.grpc.connection import GrpcConnection
from services.gateway.api.grpc.message_reader import MessageReader
from services.gateway.api.grpc.server_call import MethodSpec, ServerCall, StreamMessage
from services.gateway.api.grpc.server_state import ServerState
from services.gateway.domain.memory_budget import MemoryBudget
from tests.conftest import PATIENCE_S
from tidegate.kernel.errors import Unauthorized
from tidegate.kernel.protocol.access import ANONYMOUS, SERVICE, Principal

pytestmark = pytest.mark.unit

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EXAMPLES = 150 * int(os.environ.get("TIDEGATE_FUZZ_EXAMPLES", "1"))
ReceivedMessage = health_pb2.HealthCheckRequest


class CallConnection:
    """A transport whose other end is the test."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = False
        self.unread = 0

    def write(self, data: bytes) -> None:
        self.sent += data

    def writelines(self, pieces: list[bytes]) -> None:
        self.sent += b"".join(pieces)

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self.unread

    def close(self) -> None:
        self.closed = True

    abort = close

    def kinds(self) -> list[int]:
        """The kinds of the frames that were sent."""
        found, at = [], 0
        while at < len(self.sent):
            found.append(self.sent[at + 3])
            at += 9 + int.from_bytes(self.sent[at : at + 3], "big")
        return found


def frame(kind: int, flags: int, stream: int, payload: bytes = b"", size: int | None = None) -> bytes:
    size = len(payload) if size is None else size
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream & 0xFFFFFFFF) + payload


def message(data: bytes = b"", flag: int = 0) -> bytes:
    return struct.pack(">BI", flag, len(data)) + data


def head(path: str = "/t/Echo", *more: tuple[str, str]) -> bytes:
    fields = [(":method", "POST"), (":path", path), ("content-type", "application/grpc"), *more]
    block: bytes = Encoder().encode([(name, value.encode()) for name, value in fields])
    return block


async def echo(request: Any, call: ServerCall) -> Any:
    await asyncio.sleep(0)
    return request


async def echoes(requests: Any, call: ServerCall) -> None:
    received: StreamMessage
    async for received in requests:
        await call.write(received.message)
        call.release(received.held)


def authenticate(credential: dict[bytes, bytes]) -> Principal:
    if credential.get(b"authorization") == b"bad":
        raise Unauthorized("no")
    return SERVICE


class Harness:
    """One connection, with its limits and its transport."""

    def __init__(self, limit: int = 2**20) -> None:
        self.limits = BodyLimits(
            body_bytes=2**20, json_bytes=2**20, bodies=MemoryBudget(limit), answers=MemoryBudget(limit)
        )
        self.shared = ServerState(
            methods={
                "/t/Echo": MethodSpec(echo, ReceivedMessage, 100_000),
                "/t/Echoes": MethodSpec(echoes, ReceivedMessage, 100_000, streams=True),
                "/t/Open": MethodSpec(echo, ReceivedMessage, 100, open=True),
            },
            authenticate=authenticate,
            limits=self.limits,
            refused=lambda error, rid: None,
            max_connections=2,
        )
        self.all: set[GrpcConnection] = set()
        self.wire = CallConnection()
        self.connection = GrpcConnection(self.shared, self.all)
        self.connection.connection_made(self.wire)  # type: ignore[arg-type]

    async def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.connection.data_received(piece)
        for _ in range(6):
            await asyncio.sleep(0)


_numbers = st.one_of(
    st.sampled_from([0, 1, 2**14, 2**24, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
_streams = st.one_of(st.sampled_from([0, 1, 2, 3, 5, 7]), st.integers(0, 2**32 - 1))
_heads = st.builds(
    lambda path, more: head(path, *more),
    st.sampled_from(["/t/Echo", "/t/Echoes", "/t/Open", "/t/None", ""]),
    st.lists(
        st.tuples(
            st.sampled_from(["authorization", "grpc-timeout", "grpc-encoding", "x-request-timeout-ms", "a"]),
            st.sampled_from(["bad", "good", "1S", "0n", "99999999H", "gzip", "x", "", "10"]),
        ),
        max_size=3,
    ),
)
_messages = st.builds(
    lambda data, flag, size: struct.pack(">BI", flag, len(data) if size is None else size) + data,
    st.one_of(st.binary(max_size=30), st.binary(max_size=8).map(lambda s: b"\x0a" + bytes((len(s),)) + s)),
    st.sampled_from([0, 0, 0, 1, 255]),
    st.one_of(st.none(), st.none(), _numbers),
)
_payloads = st.one_of(
    st.binary(max_size=40),
    _numbers.map(lambda n: struct.pack(">I", n)),
    st.lists(st.tuples(st.integers(0, 8), _numbers), max_size=4).map(
        lambda pairs: b"".join(struct.pack(">HI", *pair) for pair in pairs)
    ),
)
_flags = st.one_of(st.sampled_from([0, 1, 4, 5, 8, 13, 0x2D]), st.integers(0, 255))
_frames = st.one_of(
    st.builds(frame, st.just(HEADERS), st.sampled_from([4, 5, 4, 5, 0, 0x2C]), _streams, _heads),
    st.builds(frame, st.just(DATA), st.sampled_from([0, 1, 0, 8]), _streams, _messages),
    st.builds(frame, st.integers(0, 12), _flags, _streams, _payloads),
    st.builds(frame, st.integers(0, 12), _flags, _streams, _payloads, _numbers.map(lambda n: n % 2**24)),
    st.binary(max_size=30),
)


async def fuzz(pieces: list[bytes]) -> None:
    harness = Harness()
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    await harness.send(*pieces)
    server.sweep(harness.connection, asyncio.get_running_loop().time() + 10_000)
    await harness.send()
    tasks = [call.task for call in harness.connection.calls.values() if call.task is not None]
    harness.connection.connection_lost(None)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert (harness.limits.bodies.used, harness.limits.answers.used, harness.shared.calls) == (0, 0, 0)
    assert not harness.connection.calls
    assert not harness.all
    assert not failures


@given(
    frames=st.lists(_frames, max_size=14), cut=st.integers(1, 80), greet=st.sampled_from([True] * 9 + [False])
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_input_raises_and_all_memory_is_released(frames: list[bytes], cut: int, greet: bool) -> None:
    stream = (PREFACE if greet else b"") + b"".join(frames)
    asyncio.run(fuzz([stream[at : at + cut] for at in range(0, len(stream), cut)]))


async def test_a_call_in_one_piece_and_byte_by_byte():
    body = message(b"\x0a\x03abc")
    whole = PREFACE + frame(HEADERS, 4, 1, head()) + frame(DATA, 1, 1, body)
    for pieces in ([whole], [whole[at : at + 1] for at in range(len(whole))]):
        harness = Harness()
        await harness.send(*pieces)
        assert body in harness.wire.sent
        assert harness.wire.kinds()[-3:] == [HEADERS, DATA, HEADERS]
        assert b"grpc-status\x010" in harness.wire.sent
        assert harness.limits.bodies.used == 0


async def test_a_response_waits_for_the_windows_of_its_client():
    harness = Harness()
    window = struct.pack(">HI", 4, 6)
    body = message(b"\x0a\x0812345678")
    await harness.send(
        PREFACE, frame(SETTINGS, 0, 0, window), frame(HEADERS, 4, 1, head()), frame(DATA, 1, 1, body)
    )
    assert body[:6] in harness.wire.sent
    assert b"grpc-status" not in harness.wire.sent
    assert harness.limits.answers.used == len(body) - 6
    await harness.send(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 100)))
    assert b"grpc-status\x010" in harness.wire.sent
    assert harness.limits.answers.used == 0


async def test_a_client_that_does_not_read_stops_the_answers_of_its_streams():
    harness = Harness(2**30)
    harness.connection.pause_writing()
    stream = frame(HEADERS, 4, 1, head("/t/Echoes"))
    big = message(b"\x0a\xa0\x9c\x01" + b"x" * 20_000)
    pieces = [frame(DATA, 0, 1, big[at : at + 16_384]) for at in range(0, len(big), 16_384)]
    await harness.send(PREFACE, stream, *pieces * 40)
    assert 256 * 1024 < harness.limits.answers.used < 300 * 1024, "unsent responses stay within the limit"
    assert harness.limits.bodies.used > 20 * 20_000, "the other messages were not read"
    harness.connection.resume_writing()
    await harness.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)))
    await harness.send(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 2**30)))
    for _ in range(200):
        await asyncio.sleep(0)
    assert harness.wire.sent.count(b"x" * 1000) > 0
    assert (harness.limits.answers.used, harness.limits.bodies.used) == (0, 0)
    harness.connection.connection_lost(None)


async def test_more_than_the_window_of_a_stream_resets_it():
    harness = Harness(2**30)
    harness.shared.methods["/t/Echoes"] = MethodSpec(echoes, ReceivedMessage, 2**30, streams=True)
    await harness.send(PREFACE, frame(HEADERS, 4, 1, head("/t/Echoes")))
    harness.connection.calls[1].receive_window = 100
    await harness.send(frame(DATA, 0, 1, struct.pack(">BI", 0, 1000) + bytes(200)))
    assert harness.wire.kinds()[-1] == RST_STREAM
    assert harness.wire.sent.endswith(struct.pack(">I", 3))
    assert harness.limits.bodies.used == 0


async def test_a_drain_lets_calls_end_and_accepts_no_more(monkeypatch):
    monkeypatch.setattr(connection, "LINGER_S", 0.1)
    harness = Harness()
    await harness.send(PREFACE, frame(HEADERS, 4, 1, head()))
    harness.connection.drain()
    assert harness.wire.kinds()[-1] == GOAWAY
    assert not harness.wire.closed
    await harness.send(frame(HEADERS, 4, 3, head()))
    assert harness.wire.sent.endswith(struct.pack(">I", 7)), (
        "REFUSED_STREAM: the client may send it elsewhere"
    )
    await harness.send(frame(DATA, 1, 1, message()))
    assert b"grpc-status\x010" in harness.wire.sent
    assert not harness.wire.closed, "a call may be on the way: it must be refused, not lost"
    await harness.send(frame(HEADERS, 4, 5, head()))
    assert harness.wire.sent.endswith(struct.pack(">I", 7))
    async with asyncio.timeout(PATIENCE_S):
        while not harness.wire.closed:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "after_s", "status"),
    [
        (frame(HEADERS, 4, 1, head()), server.STALL_S, b"grpc-status\x014"),
        (
            frame(HEADERS, 4, 1, head("/t/Echoes")) + frame(DATA, 0, 1, message(bytes(9))[:9]),
            server.STALL_S,
            b"\x014",
        ),
        (
            frame(HEADERS, 4, 1, head("/t/Echoes", ("grpc-timeout", "2S"))),
            2 + server.LATE_S,
            b"grpc-status\x014",
        ),
    ],
)
async def test_calls_that_stand_still_are_ended(sent, after_s, status):
    harness, loop = Harness(), asyncio.get_running_loop()
    await harness.send(PREFACE, sent)
    server.sweep(harness.connection, loop.time() + after_s - 1)
    assert b"grpc-status" not in harness.wire.sent
    server.sweep(harness.connection, loop.time() + after_s + 1)
    assert status in harness.wire.sent
    assert harness.limits.bodies.used == 0


async def test_an_idle_stream_may_live_on():
    harness, loop = Harness(), asyncio.get_running_loop()
    await harness.send(PREFACE, frame(HEADERS, 4, 1, head("/t/Echoes")), frame(DATA, 0, 1, message()))
    server.sweep(harness.connection, loop.time() + 100_000)
    assert list(harness.connection.calls) == [1]
    harness.connection.connection_lost(None)


@pytest.mark.parametrize(
    ("sent", "limit_s"),
    [(PREFACE[:5], server.HALFWAY_S), (PREFACE + b"\0", server.HALFWAY_S), (PREFACE, server.STRANGER_S)],
)
async def test_a_silent_connection_is_ended(sent, limit_s):
    harness, loop = Harness(), asyncio.get_running_loop()
    await harness.send(sent)
    server.sweep(harness.connection, loop.time() + limit_s - 1)
    assert not harness.wire.closed
    server.sweep(harness.connection, loop.time() + limit_s + 1)
    assert harness.wire.closed


@pytest.mark.parametrize(("principal", "known"), [(SERVICE, True), (ANONYMOUS, False)])
async def test_memory_for_a_message_is_reclaimed_by_whether_its_caller_is_known(principal, known):
    harness = Harness(limit=1000)
    harness.shared.authenticate = lambda _: principal
    asked: list[bool] = []
    harness.limits.bodies.reclaim = lambda _, for_known: asked.append(for_known)
    await harness.send(
        PREFACE + frame(HEADERS, 4, 1, head()), frame(DATA, 0, 1, struct.pack(">BI", 0, 50_000))
    )
    harness.limits.bodies.force(1000)
    await harness.send(frame(DATA, 0, 1, bytes(100)))
    assert asked == [known]


async def test_a_fault_in_one_connection_does_not_end_the_sweep_of_the_others(monkeypatch):
    looked: list[Any] = []

    def look(connection: GrpcConnection, now: float) -> None:
        looked.append(connection)
        raise RuntimeError("the socket has closed meanwhile")

    monkeypatch.setattr(server, "SWEEP_S", 0.001)
    monkeypatch.setattr(server, "sweep", look)
    first, second = Harness(), Harness()
    connections = {first.connection, second.connection}
    sweeping = asyncio.create_task(server.sweep_all(connections))
    while len(looked) < 4:
        await asyncio.sleep(0)
    sweeping.cancel()
    assert set(looked) == connections
    assert first.wire.closed
    assert second.wire.closed


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_compressed_message_is_read_once(encoding, monkeypatch):
    """zlib copies its unused input at each call: with 250 MB at once it would take 20 s."""
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    plain = os.urandom(4 * 2**20)
    fed = 0

    class Counting:
        def __init__(self, unpacker):
            self._unpacker = unpacker

        def __getattr__(self, name):
            return getattr(self._unpacker, name)

        def decompress(self, data, most):
            nonlocal fed
            fed += len(data)
            return self._unpacker.decompress(data, most)

    new = zlib.decompressobj
    monkeypatch.setattr(zlib, "decompressobj", lambda wbits: Counting(new(wbits)))
    budget = MemoryBudget(2**26)
    limits = BodyLimits(body_bytes=2**24, json_bytes=2**20, bodies=budget, answers=MemoryBudget(2**20))
    incoming = MessageReader(limits, 2**23, encoding.encode())
    incoming.feed(message(pack(plain), flag=1))
    whole = incoming.take()
    assert whole.data == plain
    assert fed < 5 * 2**20
    assert budget.used == whole.held


@pytest.mark.parametrize(
    "asked",
    [
        frame(HEADERS, 5, 1, head("/t/None")),
        frame(HEADERS, 5, 1, head("/t/Echo", ("authorization", "bad"))),
        frame(SETTINGS, 0, 0),
    ],
    ids=["no method", "no credential", "settings"],
)
async def test_a_client_that_sends_pings_and_does_not_read_is_ended(asked):
    """Answers to pings use no flow-control window, so only the socket could stop the client."""
    harness = Harness()
    await harness.send(PREFACE)
    harness.connection.pause_writing()
    harness.wire.unread = 100_000
    await harness.send(asked)
    assert not harness.wire.closed, "a full socket alone is allowed"
    harness.wire.unread = 600_000
    await harness.send(frame(SETTINGS, 0, 0))
    assert harness.wire.closed
    assert GOAWAY in harness.wire.kinds()

"""Whatever a peer sends, the worker's gRPC channel answers its calls or says that the connection is lost."""

from __future__ import annotations

import asyncio
import os
import struct
from typing import Any

import pytest
from hpack import Encoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.worker.adapters.grpc_unary import Failed, Gone, NotBegun, _Connection, _header_block

pytestmark = pytest.mark.unit

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
EXAMPLES = 150 * int(os.environ.get("TIDEGATE_FUZZ_EXAMPLES", "1"))
HEAD = _header_block("/test.Echo/Call")


class Sink:
    """A transport whose other end is the test."""

    def __init__(self) -> None:
        self.sent = 0
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent += len(data)

    def writelines(self, pieces: list[bytes]) -> None:
        self.sent += sum(map(len, pieces))

    def close(self) -> None:
        self.closed = True


def frame(kind: int, flags: int, stream: int, payload: bytes, size: int | None = None) -> bytes:
    size = len(payload) if size is None else size
    return struct.pack(">I", size)[1:] + struct.pack(">BBI", kind, flags, stream) + payload


async def outcomes(pieces: list[bytes], calls: int = 2) -> list[Any]:
    """Return what calls come to when a peer sends these pieces and closes the connection."""
    connection, sink = _Connection(), Sink()
    connection.connection_made(sink)  # type: ignore[arg-type]
    tasks = [asyncio.create_task(connection.call(HEAD, [bytes(100_000)], None)) for _ in range(calls)]
    await asyncio.sleep(0)
    for piece in pieces:
        connection.data_received(piece)
    connection.connection_lost(None)
    return await asyncio.gather(*tasks, return_exceptions=True)


_blocks = st.one_of(
    st.binary(max_size=40),
    st.lists(
        st.tuples(st.sampled_from(["grpc-status", "grpc-message", "x", ":status"]), st.text(max_size=8)),
        max_size=4,
    ).map(lambda fields: Encoder().encode([(name, value.encode()) for name, value in fields])),
)
_numbers = st.one_of(
    st.sampled_from([0, 1, 2**14, 2**24, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
_payloads = st.one_of(
    st.binary(max_size=40),
    _blocks,
    _numbers.map(lambda n: struct.pack(">I", n)),
    st.lists(st.tuples(st.integers(0, 8), _numbers), max_size=4).map(
        lambda pairs: b"".join(struct.pack(">HI", *pair) for pair in pairs)
    ),
    st.binary(max_size=20).map(lambda data: struct.pack(">BI", 0, len(data)) + data),
)
_frames = st.builds(
    frame,
    st.integers(0, 12),
    st.one_of(st.sampled_from([0, 1, 4, 5, 8, 13, 0x2D]), st.integers(0, 255)),
    st.one_of(st.sampled_from([0, 1, 3, 5]), st.integers(0, 2**32 - 1)),
    _payloads,
    st.one_of(st.none(), st.none(), st.none(), st.integers(0, 2**24 - 1)),
)


@given(
    frames=st.lists(st.one_of(_frames, _frames, st.binary(max_size=30)), max_size=12), cut=st.integers(1, 60)
)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_bytes_raise_anything_else(frames: list[bytes], cut: int) -> None:
    stream = b"".join(frames)
    pieces = [stream[at : at + cut] for at in range(0, len(stream), cut)]
    for outcome in asyncio.run(outcomes(pieces)):
        assert isinstance(outcome, Failed | Gone | memoryview), repr(outcome)


async def test_a_refused_call_has_not_begun():
    first, second = await outcomes([frame(RST_STREAM, 0, 1, struct.pack(">I", 7))])
    assert type(first) is NotBegun
    assert type(second) is Gone, "nobody knows how far it came"


async def test_a_call_above_the_last_stream_of_a_goaway_has_not_begun():
    first, second = await outcomes([frame(GOAWAY, 0, 0, struct.pack(">II", 1, 0))])
    assert type(first) is Gone
    assert type(second) is NotBegun


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (frame(DATA, 0, 1, b"", 2**24 - 1), "a frame of 16777215 bytes"),
        (frame(RST_STREAM, 0, 1, b"\0\0"), "unpack"),
        (frame(WINDOW_UPDATE, 0, 0, b"\0"), "unpack"),
        (2 * frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), "window"),
        (frame(SETTINGS, 0, 0, b"\0\5\0\0\0\0"), "largest frame of 0"),
        (frame(SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"), "window"),
        (frame(SETTINGS, 0, 0, b"\0"), "iterative unpacking"),
        (frame(PING, 0, 0, b"1234567"), "PING"),
        (frame(GOAWAY, 0, 0, b""), "unpack"),
        (frame(DATA, 8, 1, b"\x05abc"), "padding"),
        (frame(DATA, 8, 1, b""), "padding"),
        (frame(CONTINUATION, 4, 1, b""), "a CONTINUATION frame without a header block"),
        (frame(HEADERS, 0, 1, b"") + frame(PING, 0, 0, bytes(8)), "another frame came inside a header block"),
        (frame(HEADERS, 4, 1, b"\xff\xff\xff"), "broke HTTP/2"),
        (frame(HEADERS, 0, 1, b"") + 9 * frame(CONTINUATION, 0, 1, bytes(16_000)), "header block"),
    ],
)
async def test_a_broken_rule_ends_the_connection_and_says_which(sent: bytes, why: str):
    for outcome in await outcomes([sent]):
        assert type(outcome) is Gone
        assert "broke HTTP/2" in str(outcome)
        assert why in str(outcome)


async def test_a_peer_that_asks_and_does_not_read_is_left():
    connection, sink = _Connection(), Sink()
    connection.connection_made(sink)  # type: ignore[arg-type]
    connection.pause_writing()
    for _ in range(20):
        connection.data_received(1000 * frame(PING, 0, 0, bytes(8)))
    assert sink.closed
    assert sink.sent < 200_000


@pytest.mark.parametrize("told", ["", "x", "-1", "²", "9" * 5000])
async def test_a_status_that_is_no_number_is_an_unknown_failure(told: str):
    block = Encoder().encode([("grpc-status", told.encode())])
    first, _ = await outcomes([frame(HEADERS, 5, 1, block)])
    assert isinstance(first, Failed)
    assert first.code == 2

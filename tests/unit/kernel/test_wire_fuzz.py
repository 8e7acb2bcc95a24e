"""Whatever a broker sends: frames, or Malformed, and never more memory than is stated."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import commands, frame

from tidegate.kernel.broker.amqp import wire
from tidegate.kernel.broker.amqp.wire import FrameReader, MalformedFrame, Properties

pytestmark = [pytest.mark.unit, pytest.mark.fuzz]

FRAME_MAX = 4096


def message(body: bytes, headers: dict | None = None) -> bytes:
    """A delivery with its content."""
    published = wire.publish(
        1,
        b"",
        b"q",
        mandatory=False,
        properties=Properties(True, "reply", "100", "7", headers),
        pieces=[body],
        frame_max=FRAME_MAX,
    )
    raw = b"".join(published)
    (size,) = wire._HEAD.unpack_from(raw)[2:]
    return frame.marshal(commands.Basic.Deliver("c1", 7, False, "", "q"), 1) + raw[8 + size :]


VALID = [
    message(b""),
    message(b"body", {"cause": "lost", "n": 1}),
    message(bytes(2 * wire.LARGE)),
    wire.HEARTBEAT_FRAME,
    wire.ack(1, 3, True),
    frame.marshal(commands.Basic.GetOk(7, True, "", "q", 3), 1) + message(b"x")[-60:],
    frame.marshal(commands.Basic.GetEmpty(), 1),
    frame.marshal(commands.Basic.Nack(3, True, True), 1),
    frame.marshal(commands.Basic.Return(312, "NO_ROUTE", "", "q"), 1) + message(b"x")[-60:],
    frame.marshal(commands.Connection.Tune(1, 131_072, 60), 0),
    frame.marshal(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0),
    frame.marshal(commands.Queue.DeclareOk("q", 1, 2), 1),
    frame.marshal(commands.Connection.Start(0, 9, {"product": "x", "capabilities": {"a": True}}), 0),
]

streams = st.lists(st.sampled_from(VALID), min_size=1, max_size=4).map(b"".join)
frames = st.builds(
    lambda kind, payload: wire._HEAD.pack(kind, 1, len(payload)) + payload + b"\xce",
    st.integers(0, 9),
    st.binary(max_size=60),
)
methods = st.builds(
    lambda class_id, method_id, arguments: (
        wire._HEAD.pack(wire.METHOD, 1, 4 + len(arguments))
        + wire._INDEX.pack(class_id, method_id)
        + arguments
        + b"\xce"
    ),
    st.sampled_from([10, 20, 40, 50, 60, 85, 90]),
    st.integers(0, 130),
    st.binary(max_size=40),
)
headers = st.builds(
    lambda size, flags, values: (
        VALID[0][: VALID[0].index(b"\xce") + 1]
        + wire._CONTENT.pack(wire.HEADER, 1, 14 + len(values), 60, 0, size, flags)
        + values
        + b"\xce"
    ),
    st.integers(0, 2**64 - 1) | st.integers(0, 100),
    st.integers(0, 2**16 - 1),
    st.binary(max_size=60),
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a valid stream with a few bytes changed, removed or inserted."""
    raw = bytearray(draw(streams))
    for _ in range(draw(st.integers(1, 4))):
        # The heads matter most, and a large content has few of them.
        at = draw(st.integers(0, min(len(raw), 400) - 1) | st.integers(0, len(raw) - 1)) if raw else 0
        kind = draw(st.sampled_from(["set", "cut", "put"]))
        if kind == "put" or not raw:
            raw[at:at] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "set":
            raw[at] = draw(st.integers(0, 255))
        else:
            del raw[at : at + draw(st.integers(1, 8))]
    return bytes(raw)


def read(stream: bytes, step: int) -> list[wire.Event]:
    """Return all events of a stream that arrives ``step`` bytes at a time, as a connection reads it."""
    events: list[wire.Event] = []
    reader, at = FrameReader(), 0
    reader.frame_max = FRAME_MAX
    while at < len(stream):
        place = reader.window()
        limit = len(place) if place is not None else reader.appetite(2**18)
        piece = stream[at : at + min(limit, step)]
        at += len(piece)
        if place is not None:
            place[: len(piece)] = piece
            reader.took(len(piece))
        else:
            events += reader.feed(piece)
    return events


def check(stream: bytes, step: int) -> None:
    """Read it; raises anything but Malformed, or an AssertionError for more memory than is stated."""
    tracemalloc.start()
    try:
        read(stream, step)
    except MalformedFrame:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= wire.MOST + 40 * len(stream) + 2**20


@given(st.binary(max_size=300) | st.lists(frames | methods | headers, max_size=5).map(b"".join))
@example(wire._HEAD.pack(wire.METHOD, 0, 2**32 - 1))
@example(VALID[1][:40] + bytes(40))
def test_bytes_are_frames_or_malformed(stream):
    check(stream, 2**18)


@given(mutated(), st.sampled_from([1, 7, 1000, 2**18]))
def test_a_stream_that_was_tampered_with(stream, step):
    check(stream, max(step, len(stream) // 500))


@given(st.lists(st.sampled_from(VALID[:3]), min_size=2, max_size=2), st.data())
def test_a_content_cannot_be_begun_within_another(found, data):
    """The pieces stay within limits, whatever bytes come between two frames."""
    first = found[0]
    edges = [at + 1 for at, byte in enumerate(first[:20_000]) if byte == 0xCE]
    at = data.draw(st.sampled_from(edges))
    check(first[:at] + found[1] + first[at:], 2**18)

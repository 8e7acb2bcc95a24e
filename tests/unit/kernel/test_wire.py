"""AMQP frames in both directions: a published message is read again, in any pieces and of any size."""

from __future__ import annotations

from itertools import cycle, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame

from tidegate.kernel.broker.amqp import wire
from tidegate.kernel.broker.amqp.wire import (
    AmqpMethod,
    Delivered,
    FrameReader,
    Heartbeat,
    MalformedFrame,
    Properties,
)

pytestmark = pytest.mark.unit


def delivered(body: bytes, frame_max: int, pieces: int = 1) -> bytes:
    """A message as the broker delivers it: its method, then the content as we publish it."""
    method = frame.marshal(commands.Basic.Deliver("c1", 7, False, "", "q"), 1)
    step = -(-len(body) // pieces) or 1
    parts = [body[at : at + step] for at in range(0, len(body), step)]
    published = wire.publish(
        1, b"", b"q", mandatory=False, properties=Properties(reply_to="r"), pieces=parts, frame_max=frame_max
    )
    raw = b"".join(published)
    (size,) = wire._HEAD.unpack_from(raw)[2:]
    return method + raw[8 + size :]


def received(reader: FrameReader, stream: bytes, steps: list[int]) -> list[wire.Event]:
    """Feed a stream like a socket: into the window if there is one, never more than the appetite."""
    events: list[wire.Event] = []
    at, turns = 0, cycle(steps)
    while at < len(stream):
        place = reader.window()
        limit = len(place) if place is not None else reader.appetite(2**16)
        piece = stream[at : at + min(limit, next(turns))]
        at += len(piece)
        if place is not None:
            place[: len(piece)] = piece
            reader.took(len(piece))
        else:
            events += reader.feed(piece)
    return events


steps = st.lists(st.integers(1, 200_000), min_size=1, max_size=6)
bodies = (
    st.integers(0, 3 * wire.LARGE)
    .map(lambda size: bytes(range(256)) * (size // 256 + 1))
    .flatmap(lambda whole: st.integers(0, len(whole)).map(lambda size: whole[:size]))
)


@given(body=bodies, frame_max=st.sampled_from([4096, 131_072, 2**20]), pieces=st.integers(1, 4), steps=steps)
def test_what_is_sent_is_received_in_place(body, frame_max, pieces, steps):
    stream = delivered(body, frame_max, pieces) + wire.HEARTBEAT_FRAME + delivered(b"next", frame_max)
    first, beat, second = received(FrameReader(), stream, steps)
    assert isinstance(first, Delivered)
    assert bytes(first.body) == body
    assert first.properties.reply_to == "r"
    assert isinstance(beat, Heartbeat)
    assert isinstance(second, Delivered)
    assert bytes(second.body) == b"next"


@given(body=bodies, cuts=st.lists(st.integers(0, 2**18), max_size=5))
def test_what_is_fed_in_any_pieces_is_received(body, cuts):
    """The reader also works if its window is never used."""
    stream, reader = delivered(body, 131_072) * 2, FrameReader()
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    events = [event for start, end in pairwise(edges) for event in reader.feed(stream[start:end])]
    assert [bytes(event.body) for event in events if isinstance(event, Delivered)] == [body, body]


def test_a_heartbeat_between_the_frames_of_a_large_content():
    stream = delivered(bytes(200_000), 131_072)
    edge = stream.index(b"\xce\x03\x00\x01", 100_000) + 1
    events = received(FrameReader(), stream[:edge] + wire.HEARTBEAT_FRAME + stream[edge:], [1000])
    assert [type(event) for event in events] == [Heartbeat, Delivered]


def test_large_pieces_are_not_copied():
    large = memoryview(bytes(300_000))
    parts = wire.publish(
        1, b"", b"q", mandatory=True, properties=Properties(), pieces=[b"head", large], frame_max=131_072
    )
    shared = [part for part in parts if isinstance(part, memoryview) and part.obj is large.obj]
    assert sum(map(len, shared)) == 300_000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda raw: raw[:-1] + b"\x00", "does not end where it says"),
        (
            lambda raw: raw.replace(b"\xce\x03\x00\x01\x00\x01", b"\xce\x03\x00\x01\x00\x02", 1),
            "more content",
        ),
    ],
    ids=["no end", "too long a frame"],
)
def test_a_large_content_that_is_broken(change, told):
    stream = delivered(bytes(wire.LARGE + 10), 131_072)
    with pytest.raises(MalformedFrame, match=told):
        list(FrameReader().feed(change(stream)))


def test_no_memory_for_what_no_broker_sends():
    method = frame.marshal(commands.Basic.Deliver("c1", 7, False, "", "q"), 1)
    head = wire._CONTENT.pack(wire.HEADER, 1, 14, 60, 0, 2**40, 0) + b"\xce"
    with pytest.raises(MalformedFrame, match="a content of 1099511627776 bytes"):
        list(FrameReader().feed(method + head))


def test_other_methods_are_read_by_pamqp():
    (event,) = FrameReader().feed(frame.marshal(commands.Channel.OpenOk(), 1))
    assert isinstance(event, AmqpMethod)

"""What is written is read back, and whatever else arrives is Undecodable: never another error."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import (
    CANCELS,
    REPLIES,
    REQUESTS,
    CallKey,
    Tensor,
    Undecodable,
    read_call_key,
    read_reply,
    read_request,
    read_result_key,
    unpack,
)
from tidegate.kernel.protocol.tensors import DATATYPES

pytestmark = [pytest.mark.unit, pytest.mark.fuzz]

KINDS = (REQUESTS, REPLIES, CANCELS)
GOLDEN = [path.read_bytes() for path in sorted((Path(__file__).parent / "golden").glob("*.bin"))]
ID = bytes(16)

u8, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 32, 64))
ids = st.binary(min_size=16, max_size=16)
names = st.text(st.characters(codec="utf-8"), max_size=60)
datatypes = st.sampled_from(sorted(DATATYPES)).map(DATATYPES.__getitem__)
dims = st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(tuple)
tensors = st.lists(st.builds(Tensor, names, datatypes, dims), max_size=4).map(tuple)
outputs = st.lists(names, max_size=4).map(tuple)
values = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(st.characters(codec="utf-8"))
parameters = st.dictionaries(names, values, max_size=3)
buffers = st.lists(st.binary(max_size=40), max_size=5)


@given(kind=st.sampled_from(KINDS), frames=buffers)
def test_envelope_round_trip(kind, frames):
    assert [bytes(f) for f in unpack(kind, envelope.pack(kind, frames))] == frames


@given(
    ids, u64, u32, st.binary(max_size=80), buffers, st.binary(max_size=255), st.binary(max_size=255), u8, u8
)
def test_request_round_trip(id_, deadline, rows, key, data, tenant, trace, attempt, flags):
    frame = envelope.request_frame(
        id_, deadline, rows, key, data, tenant=tenant, trace=trace, attempt=attempt, flags=flags
    )
    got = read_request(memoryview(frame))
    assert got[:8] == (id_, deadline, rows, attempt, flags, tenant, trace, key)
    assert [bytes(d) for d in got.data] == data
    assert got.raw == frame


@given(ids, u8, u32, st.binary(max_size=80), buffers, u32, u32, u32, u32, st.integers(0, 127))
def test_reply_round_trip(id_, attempt, rows, key, data, wait, compute, shared, seq, status):
    frame = envelope.reply_frame(
        id_, attempt, rows, key, data,
        wait_us=wait, compute_us=compute, shared=shared, seq=seq, status=status,
    )  # fmt: skip
    got = read_reply(memoryview(frame))
    assert got[:9] == (id_, status, attempt, seq, rows, wait, compute, shared, key)
    assert [bytes(d) for d in got.data] == data


@given(ids, u8, names, names)
def test_failure_round_trip(id_, attempt, reason, message):
    got = read_reply(envelope.failure_frame(id_, attempt, reason, message))
    assert (got.id, got.status, got.attempt, got.data) == (id_, envelope.FAILED, attempt, [])


@given(ids, u8, u32)
def test_end_round_trip(id_, attempt, chunks):
    got = read_reply(envelope.end_frame(id_, attempt, chunks))
    assert (got.id, got.status, got.attempt, got.seq) == (id_, envelope.END, attempt, chunks)
    assert (got.key, got.data) == (b"", [])


@given(tensors, outputs, parameters)
def test_call_key_round_trip(inputs, wanted, extra):
    key = envelope.call_key(inputs, wanted, extra)
    assert read_call_key(key) == CallKey(inputs, wanted, extra)
    assert envelope.call_key(inputs, wanted, dict(reversed(extra.items()))) == key, "order must not matter"


@given(tensors, parameters)
def test_result_key_round_trip(found, extra):
    assert read_result_key(envelope.result_key(found, extra)) == (found, extra)


@given(st.lists(st.tuples(tensors, outputs, parameters), min_size=2, max_size=2))
def test_different_calls_have_different_keys(calls):
    (one, other) = calls
    assert (envelope.call_key(*one) == envelope.call_key(*other)) == (one == other)


@given(ids, st.integers(0, 255), st.integers(0, 1000))
def test_another_attempt_changes_nothing_else(id_, before, after):
    frame = envelope.request_frame(id_, 5, 1, b"key", [b"data"], attempt=before, trace=b"t")
    got = read_request(envelope.with_attempt(memoryview(frame), after))
    assert got.attempt == min(after, 255)
    assert got[:3] + got[4:8] == read_request(frame)[:3] + read_request(frame)[4:8]
    assert [bytes(d) for d in got.data] == [b"data"]


def survives(read, *given_):
    """Nothing but Undecodable comes out of a reader."""
    try:
        return read(*given_)
    except Undecodable:
        return None


def read_everything(body: bytes) -> None:
    """All that a gateway, a worker and a router do to bytes that they got."""
    for kind in KINDS:
        for frame in survives(unpack, kind, body) or ():
            request = survives(read_request, frame)
            if request is not None:
                assert isinstance((survives(read_call_key, request.key) or NOTHING).parameters, dict)
            reply = survives(read_reply, frame)
            if reply is not None:
                survives(read_result_key, reply.key)


NOTHING = CallKey((), (), {})


@given(st.binary(max_size=200))
@example(b"")
@example(b"TG\x01\x01\xff\xff\xff\xff")
@example(b"TG\x01\x01\x01\x00\x00\x00\xff\xff\xff\xff")
def test_random_bytes(body):
    read_everything(body)
    for read in (read_request, read_reply, read_call_key, read_result_key):
        survives(read, body)


@given(body=st.sampled_from(GOLDEN), data=st.data())
def test_mutated_messages(body, data):
    mutated = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(("flip", "insert", "delete"))):
            case "flip":
                mutated[at] = data.draw(u8)
            case "insert":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete" if len(mutated) > 8:
                del mutated[at : at + 4]
    read_everything(bytes(mutated))


@pytest.mark.parametrize("body", GOLDEN, ids=len)
def test_truncated_messages_are_undecodable(body):
    kind = body[3]
    for size in range(len(body)):
        with pytest.raises(Undecodable):
            unpack(kind, body[:size])
    with pytest.raises(Undecodable):
        unpack(kind, body + b"\0")


@pytest.mark.parametrize(
    ("read", "frame"),
    [
        (read_request, envelope.request_frame(ID, 1, 1, b"key", [b"ab", b""], tenant=b"t", trace=b"r")),
        (read_reply, envelope.reply_frame(ID, 0, 1, b"key", [b"ab", b""])),
    ],
    ids=["request", "reply"],
)
def test_truncated_frames_are_undecodable(read, frame):
    for size in range(len(frame)):
        with pytest.raises(Undecodable):
            read(memoryview(frame)[:size])
    with pytest.raises(Undecodable):
        read(frame + b"\0")


def test_truncated_keys_are_undecodable():
    inputs = (Tensor("x", DATATYPES["FP32"], (2, 3)),)
    key = envelope.call_key(inputs, ("y",), {})
    for size in range(len(key)):
        with pytest.raises(Undecodable):
            read_call_key(key[:size])
    result = envelope.result_key(inputs)
    for size in range(len(result)):
        with pytest.raises(Undecodable):
            read_result_key(result[:size])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"TG", "2 bytes, expected at least 8 for an envelope's head"),
        (b"XX\x01\x01" + bytes(4), "not an envelope of a known version"),
        (b"TG\x63\x01" + bytes(4), "not an envelope of a known version"),
        (b"TG\x01\x02" + bytes(4), "an envelope of kind 2, expected 1"),
        (b"TG\x01\x01\x02" + bytes(7), "the frame lengths are cut off"),
        (b"TG\x01\x01" + bytes(5), "the envelope has 9 bytes, but its frame lengths say 8"),
    ],
)
def test_what_is_wrong_is_said(body, message):
    with pytest.raises(Undecodable, match=message):
        unpack(REQUESTS, body)


@pytest.mark.parametrize("extra", [b"7", b"[]", b"null", b'"a"', b"{", b"\xff"])
def test_parameters_that_are_no_object_are_undecodable(extra):
    with pytest.raises(Undecodable):
        read_call_key(struct.pack("<HH", 0, 0) + extra)
    with pytest.raises(Undecodable):
        read_result_key(struct.pack("<H", 0) + extra)


def test_an_unknown_datatype_is_undecodable():
    key = struct.pack("<HB1sBB", 1, 1, b"x", 99, 0) + bytes(2)
    with pytest.raises(Undecodable, match="key cannot be read"):
        read_call_key(key)


def test_an_unknown_datatype_cannot_be_written():
    with pytest.raises(KeyError):
        envelope.tensor("x", "FP8", ())

"""Claims, and frames that travel alone because they are large."""

from __future__ import annotations

import pytest

from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.claim import Claim, read_claim, write_claim
from tidegate.kernel.protocol.envelope import Reply, Undecodable

pytestmark = pytest.mark.unit

KEY = "1700000040/" + "0f" * 16


def test_a_claim_is_read_as_it_was_written():
    raw = write_claim(KEY, [b"abc", memoryview(bytes(2**20)), b""])
    assert read_claim([raw]) == Claim(KEY, (3, 2**20, 0))
    assert read_claim([memoryview(write_claim(KEY, []))]) == Claim(KEY, ())


@pytest.mark.parametrize("data", [[], [b""], [b"a", b"b"], [b"\x05abc"], [b"\x01a1234567"], [b"\x01\xff"]])
def test_what_is_no_claim(data):
    with pytest.raises(Undecodable):
        read_claim(data)


def test_a_request_in_pieces_is_the_same_message():
    data: list[envelope.Buffer] = [bytes(300_000), b"small"]
    frame = envelope.request_frame(b"i" * 16, 5, 1, b"key", data, trace=b"t", flags=3)
    head = envelope.request_head(b"i" * 16, 5, 1, b"key", data, trace=b"t", flags=3)
    pieces = envelope.pack_alone(envelope.REQUESTS, [head, *data])
    assert b"".join(pieces) == envelope.pack(envelope.REQUESTS, [frame])
    assert pieces[2] is data[0]


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize("status", [envelope.OK, envelope.CHUNK])
def test_a_reply_in_pieces_is_the_same_reply(status, claimed):
    reply = Reply(b"i" * 16, status, 2, 4, 1, 10, 20, 3, b"key", [b"x" * 300_000, b"y"], claimed)
    body = b"".join(envelope.pack_alone(envelope.REPLIES, envelope.reply_pieces(reply)))
    (frame,) = envelope.unpack(envelope.REPLIES, body)
    found = envelope.read_reply(frame)
    assert found._replace(data=[bytes(d) for d in found.data]) == reply


def test_frames_are_divided_by_size_and_number():
    assert list(envelope.runs([])) == []
    assert list(envelope.runs([1, envelope.LARGE + 1, 1, 1])) == [(0, 1), (1, 2), (2, 4)]
    assert list(envelope.runs([1] * 5, 2)) == [(0, 2), (2, 4), (4, 5)]

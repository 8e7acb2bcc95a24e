"""The bytes on the wire, pinned: what is committed under ``golden/`` is what peers of this version send.

A golden file never changes. A new version of the format gets new files, and its reader still reads these.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tidegate.kernel.protocol import envelope
from tidegate.kernel.protocol.envelope import CANCELS, REPLIES, REQUESTS, Buffer, tensor
from tidegate.kernel.protocol.tensors import DATATYPES, pack_strings

pytestmark = pytest.mark.unit

GOLDEN = Path(__file__).parent / "golden"
DOCUMENT = Path(__file__).parents[3] / "docs" / "envelope.md"

DEADLINE_MS = 1_700_000_000_123
ID_1, ID_2 = bytes(range(16)), bytes(range(0xF0, 0x100))
X = (tensor("x", "FP32", (2,)),)
KEY = envelope.call_key(X, (), {})
PIXELS = bytes.fromhex("0000803f 000000c0")  # 1.0, -2.0
EVERY = tuple(tensor(f"t{code}", d.name, (code, 7)) for code, d in enumerate(DATATYPES.values()))


def one_request() -> bytes:
    return envelope.pack(REQUESTS, [envelope.request_frame(ID_1, DEADLINE_MS, 1, KEY, [PIXELS])])


def requests() -> bytes:
    key = envelope.call_key(
        (tensor("text", "BYTES", (1,)), tensor("größe", "INT64", ())),
        ("y", "z"),
        {"b": 1, "a": [True, None]},
    )
    text = pack_strings(["hallo", "", "wörld"])
    sizes = (7).to_bytes(8, "little") * 3
    second = envelope.request_frame(
        ID_2, 1, 3, key, [text, sizes], tenant=b"acme", trace=b"0123456789abcdef", attempt=2, flags=0
    )
    return envelope.pack(REQUESTS, [envelope.request_frame(ID_1, DEADLINE_MS, 2, KEY, [PIXELS * 2]), second])


def every_datatype() -> bytes:
    frame = envelope.request_frame(
        ID_1, DEADLINE_MS, 0, envelope.call_key(EVERY, (), {}), [bytes(n) for n in range(len(EVERY))]
    )
    return envelope.pack(REQUESTS, [frame])


def replies() -> bytes:
    outputs = (tensor("label", "INT64", ()), tensor("scores", "FP32", (2,)))
    good = envelope.reply_frame(
        ID_1,
        1,
        1,
        envelope.result_key(outputs, {"took": 3}),
        [(4).to_bytes(8, "little"), PIXELS],
        wait_us=1500,
        compute_us=250_000,
        shared=8,
    )
    return envelope.pack(REPLIES, [good, envelope.failure_frame(ID_2, 2, "model_failed", "kaputt: ß")])


def stream() -> bytes:
    key = envelope.result_key((tensor("token", "BYTES", (1,)),))
    chunks = [
        envelope.reply_frame(
            ID_1, 1, 0, key, [pack_strings([word])],
            wait_us=7, compute_us=20_000, status=envelope.CHUNK, seq=seq,
        )
        for seq, word in enumerate(("guten", "tag"))
    ]  # fmt: skip
    frames: list[Buffer] = [*chunks, envelope.end_frame(ID_1, 1, 2)]
    return envelope.pack(REPLIES, frames)


def stream_request() -> bytes:
    key = envelope.call_key((tensor("text_input", "BYTES", (1,)),), (), {"temperature": 0.5})
    flags = envelope.RETRY_SAFE | envelope.STREAM
    frame = envelope.request_frame(ID_1, DEADLINE_MS, 0, key, [pack_strings(["hallo"])], flags=flags)
    return envelope.pack(REQUESTS, [frame])


def cancels() -> bytes:
    frames: list[Buffer] = [ID_1, ID_2]
    return envelope.pack(CANCELS, frames)


WRITERS = [one_request, requests, every_datatype, replies, stream_request, stream, cancels]


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.v{envelope.VERSION}.bin").read_bytes()


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_todays_writer_gives_the_golden_bytes(writer):
    assert writer().hex() == golden(writer.__name__).hex()


def test_every_golden_file_has_its_writer():
    assert {f"{w.__name__}.v{envelope.VERSION}.bin" for w in WRITERS} == {p.name for p in GOLDEN.iterdir()}


def test_todays_version_is_readable():
    assert envelope.VERSION in envelope.READABLE


def test_golden_requests_are_read():
    plain, full = (envelope.read_request(f) for f in envelope.unpack(envelope.REQUESTS, golden("requests")))
    assert (plain.id, plain.deadline_ms, plain.rows, plain.attempt) == (ID_1, DEADLINE_MS, 2, 0)
    assert (plain.flags, plain.tenant, plain.trace) == (envelope.RETRY_SAFE, b"", b"")
    assert envelope.read_call_key(plain.key) == envelope.CallKey(X, (), {})
    assert [bytes(d) for d in plain.data] == [PIXELS * 2]

    assert (full.id, full.deadline_ms, full.rows, full.attempt, full.flags) == (ID_2, 1, 3, 2, 0)
    assert (full.tenant, full.trace) == (b"acme", b"0123456789abcdef")
    key = envelope.read_call_key(full.key)
    assert [(t.name, t.datatype.name, t.dims) for t in key.inputs] == [
        ("text", "BYTES", (1,)),
        ("größe", "INT64", ()),
    ]
    assert (key.outputs, key.parameters) == (("y", "z"), {"a": [True, None], "b": 1})
    assert bytes(full.data[0]) == b"\5\0\0\0hallo\0\0\0\0\6\0\0\0w\xc3\xb6rld"


def test_golden_codes_of_every_datatype():
    (frame,) = envelope.unpack(REQUESTS, golden("every_datatype"))
    request = envelope.read_request(frame)
    assert envelope.read_call_key(request.key).inputs == EVERY
    assert [len(d) for d in request.data] == list(range(len(EVERY)))


def test_golden_replies_are_read():
    good, bad = (envelope.read_reply(f) for f in envelope.unpack(REPLIES, golden("replies")))
    assert (good.id, good.status, good.attempt, good.rows) == (ID_1, envelope.OK, 1, 1)
    assert (good.wait_us, good.compute_us, good.shared) == (1500, 250_000, 8)
    outputs, parameters = envelope.read_result_key(good.key)
    assert [(t.name, t.datatype.name, t.dims) for t in outputs] == [
        ("label", "INT64", ()),
        ("scores", "FP32", (2,)),
    ]
    assert parameters == {"took": 3}
    assert [bytes(d) for d in good.data] == [(4).to_bytes(8, "little"), PIXELS]
    assert (bad.id, bad.status, bad.attempt, bad.data) == (ID_2, envelope.FAILED, 2, [])
    assert bad.key == '{"reason":"model_failed","message":"kaputt: ß"}'.encode()


def test_golden_stream_is_read():
    (asked,) = (envelope.read_request(f) for f in envelope.unpack(REQUESTS, golden("stream_request")))
    assert asked.flags == envelope.RETRY_SAFE | envelope.STREAM == 0b11
    *chunks, end = (envelope.read_reply(f) for f in envelope.unpack(REPLIES, golden("stream")))
    assert [(c.status, c.attempt, c.seq) for c in chunks] == [(2, 1, 0), (2, 1, 1)]
    assert [bytes(c.data[0]) for c in chunks] == [b"\5\0\0\0guten", b"\3\0\0\0tag"]
    assert (end.status, end.attempt, end.seq, end.key, end.data) == (3, 1, 2, b"", [])


def test_golden_cancels_are_read():
    assert [bytes(f) for f in envelope.unpack(CANCELS, golden("cancels"))] == [ID_1, ID_2]


def test_the_document_shows_the_golden_file():
    """The annotated example in ``docs/envelope.md``: offset, bytes, meaning."""
    rows = re.findall(r"^\| `([0-9a-f]{2})` \| `([0-9a-f ]+)` \|", DOCUMENT.read_text(), re.MULTILINE)
    assert rows, "no example in docs/envelope.md"
    at = 0
    for offset, shown in rows:
        assert int(offset, 16) == at
        at += len(bytes.fromhex(shown))
    assert bytes.fromhex("".join(shown for _, shown in rows)) == golden("one_request")

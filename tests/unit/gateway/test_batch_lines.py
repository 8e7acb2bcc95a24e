"""Lines of batches: split from incoming bytes, parsed, and formatted."""

from __future__ import annotations

import asyncio
import gzip
import time
import zlib
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from services.gateway.adapters.batch_files import LineSplitter
from services.gateway.api import batches
from services.gateway.domain.batch_lines import failed_line, line_id, read_line, result_line
from services.gateway.domain.batches import Batch
from services.gateway.domain.job_options import JobOptions
from tidegate.kernel.errors import BadRequest, NotFound, PayloadTooLarge

pytestmark = pytest.mark.unit


def splitter(**given_):
    return LineSplitter(**({"line_bytes": 100, "total_bytes": 10_000, "lines": 1000} | given_))


def batch(**given_):
    facts: dict[str, Any] = {"state": "running", "principal": "p", "lines": 1, "created_ms": 0, "model": "m"}
    return Batch(id=bytes(16), **facts | given_)


@given(st.lists(st.text("ab \r", max_size=8), max_size=20), st.integers(1, 7), st.booleans())
def test_lines_are_the_same_however_the_bytes_arrive(lines, step, closed):
    whole = "\n".join(lines).encode() + (b"\n" if closed else b"")
    found, cut = [], splitter()
    for at in range(0, len(whole), step):
        found += cut.feed(whole[at : at + step])
    found += cut.end()
    expected = [line.strip().encode() for line in lines if line.strip()]
    assert found == expected
    assert cut.lines == len(expected)


def test_a_long_line_in_small_pieces_takes_linear_time():
    size = 4 * 2**20
    cut, begun = splitter(line_bytes=size, total_bytes=2 * size), time.process_time()
    for _ in range(size // 64):
        assert cut.feed(b"x" * 64) == []
    assert cut.feed(b"\ny") == [b"x" * size]
    assert cut.end() == [b"y"]
    assert time.process_time() - begun < 2, "what is held must not be copied for each piece"


async def plain(*pieces, encoding="gzip"):
    async def receive():
        return next(messages)

    messages = iter(
        [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
        + [{"type": "http.request", "body": b""}]
    )
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [(b"content-encoding", encoding.encode())],
    }
    return b"".join([piece async for piece in batches._uncompressed(Request(scope, receive))])


@given(st.integers(1, 60))
def test_a_compressed_file_may_have_several_members(step):
    packed = gzip.compress(b"a\n" * 9) + gzip.compress(b"") + gzip.compress(b"b\n") + bytes(7)
    pieces = [packed[at : at + step] for at in range(0, len(packed), step)]
    assert asyncio.run(plain(*pieces)) == b"a\n" * 9 + b"b\n"


def test_bytes_after_compressed_data_are_not_kept():
    """The decompressor would keep all of it in memory."""
    with pytest.raises(BadRequest, match="not valid gzip"):
        asyncio.run(plain(gzip.compress(b"a\n"), b"x" * 100))
    with pytest.raises(BadRequest, match="not valid deflate"):
        asyncio.run(plain(zlib.compress(b"a\n"), b"x" * 100, encoding="deflate"))
    with pytest.raises(BadRequest, match="is incomplete"):
        asyncio.run(plain(gzip.compress(b"a\n")[:-1]))


def test_sizes_above_the_limits():
    with pytest.raises(PayloadTooLarge, match="line 1"):
        splitter().feed(b"x" * 101)
    with pytest.raises(PayloadTooLarge, match="line 2"):
        splitter().feed(b"a\n" + b"x" * 101 + b"\n")
    with pytest.raises(PayloadTooLarge, match="larger"):
        splitter(total_bytes=10).feed(b"a\n" * 6)
    with pytest.raises(BadRequest, match="more than 2 lines"):
        splitter(lines=2).feed(b"a\n" * 3)


def test_a_line_with_all_fields_and_one_with_none():
    raw = orjson.dumps({"model": "other", "version": 3, "priority": "high", "ttl_s": 5, "inputs": []})
    found = read_line(raw, batch())
    assert (found.model, found.version, found.options) == ("other", "3", JobOptions("high", 5.0))
    found = read_line(b'{"inputs": []}', batch(version="2", level="normal", ttl_s=60.0))
    assert (found.model, found.version, found.options) == ("m", "2", JobOptions("normal", 60.0))


@pytest.mark.parametrize(
    ("raw", "given_"),
    [
        (b"{", {}),
        (b"[]", {}),
        (b"{}", {"model": ""}),
        (b'{"model": 5}', {}),
        (b'{"version": true}', {}),
        (b'{"webhook": "https://example.org/"}', {}),
        (b'{"priority": "urgent"}', {}),
    ],
)
def test_invalid_lines(raw, given_):
    with pytest.raises(BadRequest):
        read_line(raw, batch(**given_))


def test_the_id_of_a_line():
    assert line_id(b'{"id": "mine"}') == "mine"
    assert line_id(b'{"id": 5}') is None
    assert line_id(b"no json") is None


def test_lines_of_results():
    assert orjson.loads(result_line(3, "mine", "ab", b'{"outputs":[]}')) == {
        "line": 3,
        "id": "mine",
        "job": "ab",
        "status": "succeeded",
        "response": {"outputs": []},
    }
    failed = orjson.loads(failed_line(4, None, None, "failed", NotFound("no model")))
    assert failed["error"] == {"reason": "not_found", "message": "no model"}
    assert failed["status"] == "failed"

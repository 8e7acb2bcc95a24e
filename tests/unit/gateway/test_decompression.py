"""Decompression of bodies in small pieces, within the limits and the budget."""

from __future__ import annotations

import gzip
import os
import tracemalloc
import zlib

import pytest

from services.gateway.api import decompression as inflating
from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.decompression import inflated
from services.gateway.domain.memory_budget import MemoryBudget
from tidegate.kernel.errors import BadRequest, Overloaded, PayloadTooLarge

pytestmark = pytest.mark.unit

BODY = b'{"inputs": []}' * 100
MIB = 2**20
BINARY = {b"inference-header-content-length": b"0"}


def limits(*, body=8 * MIB, json=4 * MIB, budget=64 * MIB) -> BodyLimits:
    return BodyLimits(
        body_bytes=body, json_bytes=json, bodies=MemoryBudget(budget), answers=MemoryBudget(budget)
    )


def headers(encoding: bytes, *, binary: bool = False) -> dict[bytes, bytes]:
    return {b"content-encoding": encoding} | (BINARY if binary else {})


@pytest.mark.parametrize(
    ("encoding", "sent"),
    [
        (b"gzip", gzip.compress(BODY, mtime=0)),
        (b"GZip", gzip.compress(BODY, mtime=0)),
        (b"deflate", zlib.compress(BODY)),
        (b"gzip", gzip.compress(BODY[:500]) + gzip.compress(b"") + gzip.compress(BODY[500:]) + bytes(9)),
    ],
    ids=["gzip", "GZip", "deflate", "several-members"],
)
def test_compressed_bodies_are_decompressed(encoding, sent):
    found = inflated(memoryview(sent), headers(encoding), limits())
    assert found is not None
    assert bytes(found.whole()) == BODY


@pytest.mark.parametrize("given", [{}, {b"content-encoding": b"identity"}])
def test_a_plain_body_is_unchanged(given):
    assert inflated(BODY, given, limits()) is None


def test_an_unknown_content_encoding():
    with pytest.raises(BadRequest, match="Content-Encoding 'br' is not supported: use gzip or deflate"):
        inflated(BODY, headers(b"br"), limits())


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_a_body_that_is_not_compressed_is_refused(encoding):
    with pytest.raises(BadRequest, match=f"the body is not valid {encoding.decode()}: "):
        inflated(BODY, headers(encoding), limits())


def test_data_after_the_last_member_is_refused():
    with pytest.raises(BadRequest, match="the body is not valid gzip"):
        inflated(gzip.compress(BODY) + b"hidden", headers(b"gzip"), limits())
    with pytest.raises(BadRequest, match="incomplete"):
        inflated(gzip.compress(BODY)[:-1], headers(b"gzip"), limits())


def test_a_bomb_is_refused_at_the_limit_and_its_memory_released():
    bomb = gzip.compress(bytes(64 * MIB), compresslevel=1, mtime=0)
    ours = limits()
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge, match="the JSON part has"):
            inflated(bomb, headers(b"gzip"), ours)
        with pytest.raises(PayloadTooLarge, match="the body is larger than the limit of 8388608 bytes"):
            inflated(bomb, headers(b"gzip", binary=True), ours)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert ours.bodies.used == 0
    assert peak < 24 * MIB


def test_the_budget_counts_a_body_while_it_is_decompressed():
    bomb = gzip.compress(bytes(8 * MIB), mtime=0)
    ours = limits(budget=4 * MIB)
    with pytest.raises(Overloaded):
        inflated(bomb, headers(b"gzip", binary=True), ours)
    assert ours.bodies.used == 0
    found = inflated(bomb[:0] + gzip.compress(bytes(2 * MIB)), headers(b"gzip", binary=True), ours)
    assert found is not None
    assert ours.bodies.used == 2 * MIB
    found.release()
    assert ours.bodies.used == 0


def test_a_large_incompressible_body_is_read_once():
    """zlib copies its unused input at each call: with the whole body at once it would copy 3 GB."""
    plain = os.urandom(7 * MIB)
    copied = 0

    class Counted(bytes):
        def __getitem__(self, key):
            nonlocal copied
            found = super().__getitem__(key)
            copied += len(found)
            return found

    found = inflated(Counted(zlib.compress(plain, 1)), headers(b"deflate", binary=True), limits())
    assert found is not None
    assert found.whole() == plain
    assert copied < 8 * MIB


@pytest.mark.parametrize("empty", [gzip.compress(b"", mtime=0), zlib.compress(b"")], ids=["gzip", "deflate"])
def test_too_many_empty_members_are_refused(empty, monkeypatch):
    """Each member costs microseconds, so millions would cost a minute."""
    begun = 0
    new = zlib.decompressobj

    def counted(wbits):
        nonlocal begun
        begun += 1
        return new(wbits)

    monkeypatch.setattr(zlib, "decompressobj", counted)
    encoding = "gzip" if empty[:2] == b"\x1f\x8b" else "deflate"
    with pytest.raises(BadRequest, match=f"too many {encoding} members"):
        list(inflating.Decompressor(encoding).feed(empty * (4 * MIB // len(empty))))
    assert begun < 6000


def test_a_file_of_many_members_is_decompressed():
    """bgzip writes a member for each 64 KiB."""
    block = os.urandom(1500)
    packed = gzip.compress(block) * 4000
    assert b"".join(inflating.Decompressor("gzip").feed(packed)) == block * 4000

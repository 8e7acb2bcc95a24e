"""Compression of responses: which, and how."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from typing import Any

import pytest

from services.gateway.api.compression import HttpResponse, choose_coding, deliver

pytestmark = pytest.mark.unit

LONG = b'{"outputs": []}' * 1000


def response(body: bytes = LONG, tail: tuple[bytes, ...] = ()) -> HttpResponse:
    return HttpResponse(
        200, [(b"content-length", b"%d" % (len(body) + sum(map(len, tail)))), (b"x", b"y")], body, tail
    )


async def delivered(given: HttpResponse, accepted: bytes) -> HttpResponse:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    deliver(given, {b"accept-encoding": accepted}, future.set_result)
    found: HttpResponse = await future
    return found


@pytest.mark.parametrize(
    ("accepted", "binary", "coding"),
    [
        (b"", False, None),
        (b"identity", False, None),
        (b"br, zstd", False, None),
        (b"gzip", False, b"gzip"),
        (b"deflate", False, b"deflate"),
        (b"gzip, deflate, br", False, b"gzip"),
        (b"deflate, gzip", False, b"deflate"),
        (b"GZip;q=0.5, Deflate;q=0.7", False, b"deflate"),
        (b"gzip;q=0, deflate", False, b"deflate"),
        (b"gzip;q=0", False, None),
        (b"gzip;q=much", False, None),
        (b"gzip", True, b"gzip"),
        (b"deflate", True, b"deflate"),
        (b"gzip, deflate", True, None),
    ],
)
def test_choose_coding(accepted, binary, coding):
    assert choose_coding(accepted, binary=binary) == coding


@pytest.mark.parametrize(("coding", "unpack"), [(b"gzip", gzip.decompress), (b"deflate", zlib.decompress)])
@pytest.mark.parametrize("times", [1, 100])
async def test_compressed(coding, unpack, times):
    got = await delivered(response(LONG * times, (b"tensor", b"data")), coding)
    assert unpack(got.body) == LONG * times + b"tensordata"
    headers = dict(got.headers)
    assert headers == {
        b"x": b"y",
        b"content-length": b"%d" % len(got.body),
        b"content-encoding": coding,
        b"vary": b"accept-encoding",
    }
    assert len(got.headers) == 4


@pytest.mark.parametrize(("body", "accepted"), [(b"{}", b"gzip"), (LONG, b"identity")])
async def test_some_responses_stay_uncompressed(body, accepted):
    given = response(body)
    assert await delivered(given, accepted) is given

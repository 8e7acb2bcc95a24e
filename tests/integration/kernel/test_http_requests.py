"""Unusual requests to the protocol of all services, byte by byte on a real socket."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.kernel.http_server import answers, serving

pytestmark = pytest.mark.integration

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
UPGRADE = b"Connection: upgrade\r\nUpgrade: %b\r\n"
END = b"GET /end HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture
async def server():
    async with serving() as found:
        yield found


def post(body: bytes, *lines: bytes) -> bytes:
    told = b"".join(line + b"\r\n" for line in lines)
    return b"POST /first HTTP/1.1\r\nHost: a\r\n%bContent-Length: %d\r\n\r\n%b" % (told, len(body), body)


def chunked(body: bytes, *lines: bytes, trailers: bytes = b"") -> bytes:
    told = b"".join(line + b"\r\n" for line in lines)
    head = b"POST /first HTTP/1.1\r\nHost: a\r\n%bTransfer-Encoding: chunked\r\n\r\n" % told
    return head + b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, trailers)


@pytest.mark.parametrize("word", [b"x", b"h2c", b"websocket", b"HTTP/2.0, x"])
@pytest.mark.parametrize("make", [post, chunked])
@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
async def test_a_body_behind_an_upgrade_is_a_body(server, word, make, step):
    """The body may arrive in any pieces, and the connection stays open."""
    request = make(SMUGGLED, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: " + word) + END
    pieces = [request[at : at + step] for at in range(0, len(request), step)]
    found = answers(await server.exchange(*pieces, pause_s=0.001 if step > 1 else 0))
    assert [status for status, _, _ in found] == [200, 200]
    seen = [(each["path"], each["body"]) for each in server.app.seen]
    assert seen == [("/first", SMUGGLED.decode()), ("/end", "")]


@pytest.mark.parametrize("make", [post, chunked])
async def test_at_every_place_where_a_read_can_end(server, make):
    request = make(SMUGGLED, b"Connection: upgrade", b"Upgrade: x") + END
    for at in range(1, len(request)):
        found = answers(await server.exchange(request[:at], request[at:], pause_s=0.002))
        assert [status for status, _, _ in found] == [200, 200], at
    assert {each["path"] for each in server.app.seen} == {"/first", "/end"}


async def test_many_upgrades_in_one_write(server):
    request = post(b"12345", b"Connection: upgrade", b"Upgrade: h2c")
    found = answers(await server.exchange(request * 20 + END))
    assert [status for status, _, _ in found] == [200] * 21
    assert [each["body"] for each in server.app.seen] == ["12345"] * 20 + [""]


async def test_an_upgrade_without_a_body(server):
    request = b"GET /first HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert [status for status, _, _ in answers(await server.exchange(request + END))] == [200, 200]
    assert "upgrade" not in [name for name, _ in server.app.seen[0]["headers"]]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n" + SMUGGLED, 501),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x@localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400),
    ],
)
async def test_what_is_no_request_is_told_so_in_json(server, request_, status):
    ((seen, headers, told),) = answers(await server.exchange(request_))
    assert (seen, sorted(told)) == (status, ["error", "reason", "request_id"])
    assert headers["x-request-id"] == told["request_id"]
    assert headers["connection"] == "close"
    assert server.app.seen == []


async def test_the_id_of_a_refused_request_comes_back(server):
    raw = await server.exchange(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nX-Request-Id: mine\r\n\r\n")
    assert answers(raw)[0][2]["request_id"] == "mine"


async def test_trailers_are_no_headers(server):
    trailers = b"Host: evil\r\nAuthorization: Bearer x\r\nX-Request-Timeout-Ms: 1\r\n"
    ((status, _, told),) = answers(
        await server.exchange(chunked(b"body", b"Connection: close", trailers=trailers))
    )
    names = [name for name, _ in told["headers"]]
    assert (status, told["body"]) == (200, "body")
    assert names == ["host", "connection", "transfer-encoding"]


HEAD = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (HEAD + b"x: %b\r\n\r\n" % (b"v" * 65_000), 200),
        (HEAD + b"x: %b\r\n\r\n" % (b"v" * 66_000), 431),
        (HEAD + b"%b: v\r\n\r\n" % (b"x" * 66_000), 431),
        (b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"u" * 66_000), 431),
        (HEAD + b"x: 1\r\n" * 98 + b"\r\n", 200),
        (HEAD + b"x: 1\r\n" * 99 + b"\r\n", 431),
        (HEAD + b"x: %b\r\n" % (b"v" * 1000) * 70 + b"\r\n", 431),
    ],
)
@pytest.mark.parametrize("step", [1000, 20_000, 200_000])
async def test_a_head_has_a_limit(server, head, status, step):
    pieces = [head[at : at + step] for at in range(0, len(head), step)]
    try:
        raw = await server.exchange(*pieces, pause_s=0.001)
    except ConnectionError:
        pytest.fail("the answer was lost")
    ((seen, _, told),) = answers(raw)
    assert seen == status
    if status == 431:
        assert told["reason"] == "head_too_large"
        assert "65536 bytes and 100 fields" in told["error"]


@pytest.mark.parametrize(
    "tail",
    [
        b"0\r\n" + b"t: 1\r\n" * 98 + b"\r\n",
        b"0\r\nt: %b\r\n\r\n" % (b"v" * 66_000),
        b"0\r\n" + b"t: %b\r\n" % (b"v" * 1000) * 66 + b"\r\n",
        b"4;%b\r\nbody\r\n0\r\n\r\n" % (b"e" * 300_000),
        b"4;%b\r\nbody\r\n" % (b"e" * 20_000) * 20 + b"0\r\n\r\n",
    ],
    ids=["fields", "one field", "bytes", "one extension", "many extensions"],
)
async def test_what_chunks_bring_beside_their_bytes_has_a_limit(server, tail):
    head = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nX-Request-Id: r\r\n\r\n"
    pieces = [head, *(tail[at : at + 4000] for at in range(0, len(tail), 4000))]
    ((status, _, told),) = answers(await server.exchange(*pieces, pause_s=0.001))
    assert (status, told["reason"], told["request_id"]) == (431, "head_too_large", "r")
    assert "body" not in server.app.seen[-1], "the app is told that its caller has gone"


async def test_small_chunks_are_no_attack(server):
    """A client that writes byte by byte sends one byte per chunk."""
    pieces = [b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"]
    pieces += [b"1\r\nx\r\n" * 5000] * 10 + [b"0\r\n\r\n"]
    ((status, _, told),) = answers(await server.exchange(*pieces, pause_s=0.001))
    assert (status, told["body"]) == (200, "x" * 50_000)


async def test_a_bad_request_does_not_answer_in_place_of_the_one_before(server):
    """The request that is being answered gets its answer first, then the connection ends."""
    server.app.gate.clear()
    exchange = asyncio.create_task(server.exchange(post(b"first"), b"nonsense\r\n\r\n", pause_s=0.05))
    while not server.app.seen:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    server.app.gate.set()
    found = answers(await exchange)
    assert [(status, told.get("body")) for status, _, told in found] == [(200, "first"), (400, None)]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "bad",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["request line", "head", "body"],
)
async def test_a_bad_request_takes_no_answer_from_those_before_it(server, bad, together):
    good = [post(b"%d" % n) for n in range(50)]
    pieces = [b"".join((*good, bad))] if together else [*good, bad]
    found = answers(await server.exchange(*pieces, pause_s=0.0 if together else 0.001))
    assert [told["body"] for _, _, told in found[:-1]] == [str(n) for n in range(50)]
    status, headers, told = found[-1]
    assert (status, told["reason"], headers["connection"]) == (400, "bad_request", "close")


@pytest.mark.parametrize("blanks", [b" ", b"\t", b" \t  "])
async def test_blanks_around_a_value_are_no_part_of_it(server, blanks):
    lines = [
        b"%b:%b%b%b" % (n, blanks, v, blanks) for n, v in ((b"X-Mine", b"a b"), (b"Connection", b"close"))
    ]
    ((status, _, told),) = answers(await server.exchange(post(b"", *lines)))
    assert status == 200
    assert ["x-mine", "a b"] in told["headers"]
    assert ["connection", "close"] in told["headers"]


async def test_pipelined_requests_have_a_limit(server):
    """One write can contain thousands, and each waiting one needs far more memory than its bytes."""
    server.app.gate.clear()
    request = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"
    exchange = asyncio.create_task(server.exchange(b"".join(request % n for n in range(2000))))
    while not server.app.seen:
        await asyncio.sleep(0.01)
    server.app.gate.set()
    *found, (status, _, refusal) = answers(await exchange)
    assert [told["path"] for _, _, told in found] == [f"/{n}" for n in range(len(found))]
    assert 2 <= len(found) <= 66
    assert (status, refusal["reason"]) == (429, "too_many_requests")

"""Hostile connections to a real gateway on loopback, where inference needs no credential."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S, Figure
from tests.integration.kernel.http_server import answers
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration

MIB = 2**20
INFER = "/v2/models/digits/infer"
BODY = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}).encode()
KNOWN = {"Authorization": "Bearer token"}
MOST_HELD = 4 * MIB
SMUGGLED = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(scope="module")
def gateway_env() -> dict[str, str]:
    return {
        "TIDEGATE_MAX_INFLIGHT_BYTES": str(MOST_HELD),
        "TIDEGATE_HTTP_BODY_GRACE_S": "3600",
        "TIDEGATE_HTTP_HEADER_TIMEOUT_S": "3600",
    }


def infer(body: bytes, *lines: str, path: str = INFER) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


async def exchange(port: int, *pieces: bytes) -> bytes:
    """Send each piece in a write of its own; return everything until the gateway closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.005)
        async with asyncio.timeout(PATIENCE_S):
            return await reader.read()
    finally:
        writer.transport.abort()


@pytest.mark.parametrize("word", ["h2c", "websocket", "x"])
@pytest.mark.parametrize("path", [INFER, "/v2/models/digits/generate"])
async def test_an_upgrade_is_ignored(gateway, worker, word, path):
    """Java's HttpClient sends ``h2c`` with valid requests."""
    body = BODY if path == INFER else b'{"x": [1, 2]}'
    lines = [f"Upgrade: {word}", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAEAAEAAAAIAAAAB"]
    request = infer(body, *lines, path=path) + infer(BODY, "Connection: close")
    head = request.index(b"\r\n\r\n") + 4
    for at in (1, head - 1, head, head + 1, head + len(body) - 1, len(request) - 1):
        found = answers(await exchange(gateway.port, request[:at], request[at:]))
        assert [status for status, _, _ in found] == [200, 200], at


async def test_a_body_is_never_read_as_a_request(gateway, worker):
    """Every body is refused as a body; no part of it is answered as a request."""
    for lines in (["Upgrade: x", "Connection: upgrade"], []):
        request = infer(SMUGGLED * 3, *lines) + infer(BODY, "Connection: close")
        for at in range(100, len(request), 37):
            found = answers(await exchange(gateway.port, request[:at], request[at:]))
            assert [status for status, _, _ in found] == [400, 200], at


NGINX = """
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1; user root;
events {{ worker_connections 64; }}
http {{
  access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://127.0.0.1:{gateway};
      proxy_http_version 1.1;
      proxy_request_buffering {buffering};
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection "upgrade";
    }}
  }}
}}
"""


@pytest.fixture(params=["on", "off"])
def nginx(request, gateway, tmp_path: Path) -> Iterator[int]:
    """The port of a real nginx in front of the gateway, with the usual lines for WebSockets."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx)")
    (port,) = free_ports(1)
    text = NGINX.format(folder=tmp_path, port=port, gateway=gateway.port, buffering=request.param)
    if os.getuid() != 0:
        text = text.replace(" user root;", "")
    (tmp_path / "conf").write_text(text)
    process = subprocess.Popen([program, "-c", str(tmp_path / "conf"), "-e", str(tmp_path / "error.log")])
    try:
        yield port
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


async def test_a_body_is_never_read_as_a_request_behind_nginx(nginx, gateway, worker, until):
    async def up() -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", nginx)
        except ConnectionError:
            return False
        writer.transport.abort()
        return True

    await until(up)
    upgrade = ["Upgrade: websocket", "Connection: close"]
    good = await exchange(nginx, infer(BODY, *upgrade))
    assert good.startswith(b"HTTP/1.1 200 ")
    for body in (SMUGGLED, SMUGGLED * 50):
        request = infer(body, *upgrade)
        for at in range(len(request) - len(body), len(request), len(body) // 5):
            raw = await exchange(nginx, request[:at], request[at:])
            assert (raw[:13], raw.count(b"HTTP/1.1 ")) == (b"HTTP/1.1 400 ", 1), at


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Host: localhost"], 400),
        (["Host: evil.example"], 400),
        (["Authorization: Bearer token", "Authorization: Bearer x"], 400),
        (["Origin: http://evil.example"], 403),
        (["Sec-Fetch-Site: cross-site"], 403),
        (["Sec-Fetch-Site: same-site"], 403),
        (["Inference-Header-Content-Length: " + "1" * 5000], 400),
        (["Inference-Header-Content-Length: " + "0" * 5000], 400),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_bad_headers_are_refused(gateway, worker, lines, status):
    raw = await exchange(gateway.port, infer(BODY, *lines, "Connection: close"))
    ((found, _, told),) = answers(raw)
    assert (found, sorted(told)) == (status, ["error", "reason", "request_id"])


@pytest.mark.parametrize("host", ["x@localhost", "localhost/", None])
async def test_a_host_is_a_host(gateway, host):
    line = b"" if host is None else f"Host: {host}\r\n".encode()
    raw = await exchange(gateway.port, infer(BODY).replace(b"Host: localhost\r\n", line))
    assert answers(raw)[0][0] == 400


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_page_cannot_even_read(client, site):
    for path in (f"{INFER[:-6]}/ready", "/v2/models/digits", "/v2", "/health/live", "/metrics"):
        answer = await client.get(path, headers={"Sec-Fetch-Site": site})
        assert (answer.status_code, answer.json()["reason"]) == (403, "forbidden"), path


async def test_white_space_does_not_hide_a_length(gateway):
    for path in (INFER, "/v2/models/digits/generate"):
        head = infer(b"", "Connection: close", path=path).replace(
            b"Content-Length: 0", b"Content-Length: 314572800  "
        )
        ((status, _, told),) = answers(await exchange(gateway.port, head))
        assert (status, told["reason"]) == (413, "payload_too_large")


async def test_trailers_do_not_count_as_headers(gateway, worker):
    """A wrong credential would be refused."""
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    )
    chunk = b"%x\r\n%b\r\n0\r\nAuthorization: Bearer wrong\r\nHost: evil.example\r\n\r\n" % (len(BODY), BODY)
    assert answers(await exchange(gateway.port, head.encode(), chunk))[0][0] == 200


async def test_invented_model_names_do_not_grow_the_metrics(client, figure: Figure):
    """Callers send invented names, with every early refusal."""
    before = len((await client.get("/metrics")).text)
    for number in range(300):
        name = f"made-up-{number}"
        for headers, content in (
            ({"Origin": "http://evil.example"}, BODY),
            ({"Authorization": "Bearer tg_wrong"}, BODY),
            ({"Inference-Header-Content-Length": "x"}, BODY),
            ({}, BODY),
        ):
            answer = await client.post(f"/v2/models/{name}/infer", content=content, headers=headers)
            assert answer.status_code in {400, 401, 403, 404, 503}
    page = (await client.get("/metrics")).text
    figure(f"1,200 requests with 300 made-up names: the page of metrics grew by {len(page) - before} bytes")
    assert "made-up" not in page
    assert len(page) - before < 5_000


class Held:
    """A connection with a body that stays one byte short."""

    @classmethod
    async def open(cls, port: int, *lines: str, size: int = 65_536) -> Held:
        found = cls()
        found.reader, found.writer = await asyncio.open_connection("127.0.0.1", port)
        found.writer.write(infer(b"x" * size, *lines)[:-1])
        await found.writer.drain()
        return found

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> tuple[int, str]:
        async with asyncio.timeout(PATIENCE_S):
            ((status, _, told),) = answers(await self.reader.read())
        return status, told["reason"]


async def flood(port: int) -> list[Held]:
    return await asyncio.gather(*(Held.open(port) for _ in range(2 * MOST_HELD // 65_536)))


async def test_a_caller_with_a_credential_is_answered_beside_bodies_that_stand_still(gateway, client, worker):
    """With twice the budget in bodies that lack a byte, its requests are answered at once."""
    held = await flood(gateway.port)
    for body in (BODY, BODY + b" " * 60_000, BODY + b" " * MIB, BODY) * 5:
        answer = await client.post(INFER, content=body, headers=KNOWN)
        assert answer.status_code == 200, answer.text
    gone = [each for each in held if each.reader.at_eof() or each.reader._buffer]  # type: ignore[attr-defined]
    assert {await each.answer() for each in gone} <= {(408, "body_too_slow"), (503, "overloaded")}
    for each in held:
        each.writer.transport.abort()


async def test_without_a_credential_bodies_that_make_progress_stay(gateway, client, worker, until):
    held = await flood(gateway.port)

    async def answered() -> bool:
        return (await client.post(INFER, content=BODY + b" " * 60_000)).status_code == 200

    await until(answered)
    for _ in range(20):
        assert await answered()
    for each in held:
        each.writer.transport.abort()


async def test_large_bodies_that_stand_still_are_dropped_too(gateway, client, worker, until):
    """They are received in place. Each gets the reason, and its memory is free again."""
    held = [await Held.open(gateway.port, size=MIB) for _ in range(6)]
    for _ in range(5):
        answer = await client.post(INFER, content=BODY + b" " * MIB, headers=KNOWN)
        assert answer.status_code == 200, answer.text
    found = await asyncio.gather(*(each.answer() for each in held[:2]))
    assert found == [(408, "body_too_slow")] * 2, "the oldest bodies"
    for each in held:
        each.writer.transport.abort()

    async def free() -> bool:
        full = BODY + b" " * (MOST_HELD * 3 // 4)
        return (await client.post(INFER, content=full)).status_code == 200

    await until(free)

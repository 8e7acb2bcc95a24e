"""The HTTP servers of all five services stand what one hostile connection can send."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import Stack
from tests.integration.kernel.http_server import answers

pytestmark = pytest.mark.e2e

SERVICES = ["gateway", "registry", "router", "autoscaler", "worker"]
LIVE = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n%b\r\n"


@pytest.fixture(params=SERVICES)
def port(request: pytest.FixtureRequest, stack: Stack, served: str) -> int:
    """The port of a service."""
    if request.param != "worker":
        return urlsplit(getattr(stack.settings, f"{request.param}_url")).port or 0
    worker = stack.worker(f"{served}-v1")
    listening = [c for c in worker.net_connections("tcp") if c.status == "LISTEN"]
    return int(listening[0].laddr.port)


def exchange(port: int, *pieces: bytes) -> bytes:
    """All that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), 20) as door:
        door.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found = b""
        try:
            for piece in pieces:
                door.sendall(piece)
            while chunk := door.recv(65_536):
                found += chunk
        except ConnectionError:
            pass
        return found


def test_no_request_is_made_of_a_body(port):
    body = LIVE % b""
    lines = b"Connection: upgrade\r\nUpgrade: x\r\nContent-Length: %d\r\n" % len(body)
    request = LIVE.replace(b"GET", b"POST") % lines + body
    found = answers(exchange(port, *(bytes([byte]) for byte in request), LIVE % b"Connection: close\r\n"))
    assert len(found) == 2, "one answer for each request, none for the body"
    assert found[0][0] in {401, 404, 405}
    assert (found[1][0], found[1][2]) == (200, {"status": "live"})


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((LIVE[:-4], b"a:\r\n" * 50_000), 431),
        ((LIVE[:-4] + b"x: ", b"v" * 100_000), 431),
        ((LIVE % b"Host: other\r\n",), 400),
        ((b"GET /health/live HTTP/1.1\r\n\r\n",), 400),
        ((b"nonsense\r\n\r\n",), 400),
        ((LIVE % b"Sec-Fetch-Site: cross-site\r\nConnection: close\r\n",), 403),
    ],
    ids=["lines", "a line", "two hosts", "no host", "nonsense", "a page"],
)
def test_what_is_refused_is_told_in_json(port, pieces, status):
    ((found, headers, told),) = answers(exchange(port, *pieces))
    assert (found, sorted(told)) == (status, ["error", "reason", "request_id"])
    assert headers["x-request-id"] == told["request_id"]

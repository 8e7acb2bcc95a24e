"""Reading the description of an upstream's model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, ClassVar

import pytest

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.oip_upstream import described

pytestmark = pytest.mark.unit


class Far(BaseHTTPRequestHandler):
    """A server that answers each request with ``status``, and keeps the path and two headers."""

    status = 404
    seen: ClassVar[list[tuple[str, str | None, str | None]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Authorization"], self.headers["api-key"]))
        self.send_response(self.status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Stay quiet."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a model at such a server. The variable with its key ends with a line break."""
    monkeypatch.setenv("FAR_API_KEY", "secret\n")
    monkeypatch.setattr(Far, "seen", [])
    server = HTTPServer(("127.0.0.1", 0), Far)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v2/models/m"
    server.shutdown()
    server.server_close()


def test_a_redirect_does_not_take_the_credential_to_another_address(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Far, "status", 302)
    with pytest.raises(UsageError, match="302"):
        described(address, "env:FAR_API_KEY")
    assert [path for path, _, _ in Far.seen] == ["/v2/models/m"]


def test_the_credential_is_in_the_named_header(address: str) -> None:
    for header in (None, "api-key"):
        with pytest.raises(UsageError, match="404"):
            described(address, "env:FAR_API_KEY", header)
    assert [sent for _, *sent in Far.seen] == [["Bearer secret", None], [None, "secret"]]

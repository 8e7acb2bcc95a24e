"""Reading the description of an upstream's model."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tidegate.cli.exit_codes import UsageError
from tidegate.cli.oip_upstream import described

pytestmark = pytest.mark.unit


def test_a_redirect_does_not_take_the_credential_to_another_address(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(302)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Stay quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FAR_API_KEY", "secret")
    try:
        with pytest.raises(UsageError, match="302"):
            described(f"http://127.0.0.1:{server.server_port}/v2/models/m", "env:FAR_API_KEY")
    finally:
        server.shutdown()
        server.server_close()
    assert seen == ["/v2/models/m"]


def test_the_credential_is_in_the_named_header(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append((self.headers["Authorization"], self.headers["api-key"]))
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Stay quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FAR_API_KEY", "secret\n")
    try:
        for header in (None, "api-key"):
            with pytest.raises(UsageError, match="404"):
                described(f"http://127.0.0.1:{server.server_port}/v2/models/m", "env:FAR_API_KEY", header)
    finally:
        server.shutdown()
        server.server_close()
    assert seen == [("Bearer secret", None), (None, "secret")]

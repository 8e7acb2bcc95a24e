"""An upstream's answer is limited, because the worker keeps it in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from services.worker.runtimes.oip.upstream_http import Upstream, UpstreamRefused

pytestmark = pytest.mark.unit

OUTPUT = {"name": "y", "datatype": "FP32", "shape": [1], "data": [2.0]}
BODY = json.dumps({"outputs": [OUTPUT]}).encode()
CREDENTIALS: list[tuple[str | None, str | None]] = []


class Answers(BaseHTTPRequestHandler):
    """Answers with BODY and as many spaces as the path says, in chunks if the path says so."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        _, how, spaces, _ = self.path.split("/")
        CREDENTIALS.append((self.headers["Authorization"], self.headers["api-key"]))
        body = BODY + b" " * int(spaces)
        self.send_response(200)
        if how == "chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Write nothing."""


class Server(ThreadingHTTPServer):
    """A server that is silent about connections that the client closes."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Write nothing."""


@pytest.fixture
def address() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("how", ["length", "chunks"])
def test_an_answer_that_is_too_long_is_an_error_of_its_request(address: str, how: str):
    limit = len(BODY) + 10

    def ask(spaces: int) -> Any:
        plan = {"address": f"{address}/{how}/{spaces}", "binary": False, "timeout_s": 60.0}
        upstream = Upstream(plan | {"answer_bytes": limit}, "")
        try:
            return upstream.infer([("x", np.zeros(1, np.float32))], ["y"])["y"]
        finally:
            upstream.close()

    assert ask(10) == [2.0]
    with pytest.raises(UpstreamRefused, match=f"more than {limit} bytes.*TIDEGATE_MAX_FETCHED_BYTES"):
        ask(11)


@pytest.mark.parametrize(
    ("secret", "header", "expected"),
    [
        ("k", None, ("Bearer k", None)),
        ("k", "api-key", (None, "k")),
        ("k", "authorization", ("k", None)),
        ("", "api-key", (None, None)),
    ],
)
def test_the_header_of_a_credential(address: str, secret: str, header: str | None, expected: Any):
    plan = {"address": f"{address}/length/0", "binary": False, "timeout_s": 60.0, "answer_bytes": len(BODY)}
    upstream = Upstream(plan | {"credential_header": header}, secret)
    upstream.infer([("x", np.zeros(1, np.float32))], ["y"])
    upstream.close()
    assert CREDENTIALS[-1] == expected


def test_the_next_request_does_not_read_the_rest_of_a_long_answer(address: str):
    upstream = Upstream(
        {
            "address": f"{address}/chunks/100000",
            "binary": False,
            "timeout_s": 60.0,
            "answer_bytes": len(BODY) + 10,
        },
        "",
    )
    for _ in range(2):
        with pytest.raises(UpstreamRefused, match="more than"):
            upstream.infer([("x", np.zeros(1, np.float32))], ["y"])
    upstream.close()

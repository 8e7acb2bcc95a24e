"""Relay a request to an HTTP server with OpenAI's API, and emit the events of its answer.

Each request has its own connection, over TCP, TLS or a Unix socket. If the caller no longer waits, the
connection is closed, so that the engine stops and its slot becomes free.
"""

from __future__ import annotations

import http.client
import json
import math
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

from calls import Call, Refused

# The most bytes of one event, and of an answer that is not a stream.
MAX_EVENT, MAX_BODY = 16 * 2**20, 64 * 2**20
BLOCK = 64 * 1024
LAST = b"[DONE]"
# The only URL paths that callers may use. A server also has URL paths for operators, and it trusts this
# process. Without this list, callers could use the operators' paths.
PATHS = frozenset({
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/tokenize", "/detokenize",
    "/apply-template", "/pooling", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank",
})  # fmt: skip
# The streams of these paths end with LAST.
_ENDED = frozenset({"/v1/chat/completions", "/v1/completions"})


@dataclass(frozen=True)
class Server:
    """An HTTP server. ``url`` is its address, or ``socket`` is the file path of its Unix socket.

    ``connect_s``: the maximum seconds to connect. ``first_s``: the maximum seconds until the head of the
    answer arrives. ``silence_s``: the maximum seconds between two parts of the answer.
    """

    url: str = "http://localhost"
    socket: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    connect_s: float = 10.0
    first_s: float = 600.0
    silence_s: float = 300.0

    def open(self) -> http.client.HTTPConnection:
        """Connect to the server, and return the connection. Raise OSError if this fails."""
        parts = urlsplit(self.url)
        if self.socket:
            connection: http.client.HTTPConnection = _UnixConnection(self.socket, self.connect_s)
        elif parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(
                parts.hostname or "", parts.port, timeout=self.connect_s, context=context
            )
        else:
            connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=self.connect_s)
        connection.connect()
        return connection

    def path(self, path: str) -> str:
        """Return the URL path of a request: the path of the server's address, followed by ``path``."""
        base = urlsplit(self.url).path.rstrip("/")
        # An address usually ends in /v1, like the base_url of a client. Then remove the /v1 from ``path``, so
        # that it does not occur twice.
        return base + (path.removeprefix("/v1") if base.endswith("/v1") else path)


def check_path(path: str) -> None:
    """Raise Refused if callers may not use this URL path."""
    if path not in PATHS:
        raise Refused(404, f"The engine serves no requests at the path {path[:80]!r}.", code="unknown_path")


class Reader(Protocol):
    """Converts an engine's answer to events for the caller, and extracts facts such as token counts."""

    def read(self, event: bytes) -> tuple[list[bytes], dict[str, Any]]:
        """Convert an event of the engine to events for the caller. Also return the event's facts."""

    def whole(self, body: bytes) -> tuple[bytes, dict[str, Any]]:
        """Convert the body of a non-streamed answer for the caller. Also return the answer's facts."""


class Failure(Exception):
    """Error before the first event: the server answered with an error status, or did not answer.

    ``status``: the HTTP status; 0 if there was no answer. ``body``: the error body, for the caller.
    ``retry_after_s``: the server's ``Retry-After``, in seconds.
    """

    def __init__(
        self, status: int, body: bytes = b"", retry_after_s: float | None = None, reason: str = ""
    ) -> None:
        super().__init__(reason or f"status {status}")
        self.status, self.body, self.retry_after_s = status, body, retry_after_s


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def relay(
    server: Server,
    path: str,
    body: dict[str, Any],
    reader: Reader,
    call: Call,
    on_head: Callable[[], None] = lambda: None,
) -> None:
    """Send a request and emit its answer until the end, or until the call is cancelled.

    ``on_head`` is called when an answer without an error begins. If the request fails before the first event,
    raise :class:`Failure`. If the stream breaks off later, raise :class:`Refused`.
    """
    emitted = False
    try:
        sock, answer = _send(server, path, body, call)
        with answer:
            if not 200 <= answer.status < 300:
                raise _failure(answer)
            sock.settimeout(server.silence_s)
            on_head()
            if "text/event-stream" not in answer.headers.get("Content-Type", ""):
                whole, meta = reader.whole(_limited(answer))
                call.emit([whole], meta)
                return
            ended = False
            for events in _events(answer):
                emitted, ended = True, events[-1] == LAST
                _emit(events, reader, call)
            if not ended and path in _ENDED and not call.cancelled:
                raise ConnectionError("the server closed the connection before the end of the stream")
    except (OSError, http.client.HTTPException) as problem:
        if call.cancelled:
            return
        reason = "the server was silent for too long" if isinstance(problem, TimeoutError) else f"{problem}"
        if not emitted:
            raise Failure(0, reason=reason or repr(problem)) from None
        raise Refused(
            502,
            f"The stream broke off: {reason}. Send the request again.",
            "server_error",
            "stream_broke_off",
        ) from None


def get(server: Server, path: str, timeout_s: float = 5.0) -> tuple[int, bytes]:
    """Return the status and the body of a GET. Raise OSError or HTTPException if the GET fails."""
    connection = server.open()
    try:
        connection.sock.settimeout(timeout_s)
        connection.request("GET", path, headers={**server.headers, "Connection": "close"})
        answer = connection.getresponse()
        return answer.status, _limited(answer)
    finally:
        connection.close()


def post(server: Server, path: str, body: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
    """Return the JSON object that answers a small request.

    Raise OSError or HTTPException if the request fails. Raise ValueError if the status is not 200, or if the
    answer is no JSON object.
    """
    connection = server.open()
    try:
        connection.sock.settimeout(timeout_s)
        connection.request("POST", server.path(path), json.dumps(body).encode(), _headers(server))
        answer = connection.getresponse()
        found = json.loads(_limited(answer))
        if answer.status != 200 or not isinstance(found, dict):
            raise ValueError(f"{path} answered {answer.status}")
        return found
    finally:
        connection.close()


def _headers(server: Server) -> dict[str, str]:
    return {
        "Content-Type": "application/json",
        "Accept": "text/event-stream, application/json",
        "Connection": "close",
        **server.headers,
    }


def _send(
    server: Server, path: str, body: dict[str, Any], call: Call
) -> tuple[socket.socket, http.client.HTTPResponse]:
    connection = server.open()
    # Keep a reference to the socket, so that a cancellation can shut it down. http.client drops its own
    # reference if the server will close the connection.
    sock = connection.sock
    call.on_cancel(lambda: sock.shutdown(socket.SHUT_RDWR))
    sock.settimeout(server.first_s)
    try:
        connection.request("POST", server.path(path), json.dumps(body).encode(), _headers(server))
        return sock, connection.getresponse()
    except BaseException:
        connection.close()
        raise


def _failure(answer: http.client.HTTPResponse) -> Failure:
    return Failure(answer.status, _limited(answer), retry_after_s(answer.headers))


def retry_after_s(headers: Any) -> float | None:
    """Return the seconds of ``retry-after-ms`` or ``Retry-After``; None if neither is a number."""
    for name, factor in (("retry-after-ms", 1e-3), ("Retry-After", 1.0)):
        try:
            seconds = float(headers[name]) * factor
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None


def _limited(answer: http.client.HTTPResponse) -> bytes:
    body = answer.read(MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise ConnectionError(f"the answer has more than {MAX_BODY} bytes")
    return body


def _events(answer: http.client.HTTPResponse):
    """Yield lists of events that arrived together. An event is the text after ``data: ``."""
    rest = b""
    while block := answer.read1(BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > MAX_EVENT:
            raise ConnectionError(f"an event has more than {MAX_EVENT} bytes")
        events = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        if events:
            yield events
    if rest.startswith(b"data:"):
        yield [rest[5:].strip()]


def _emit(events: list[bytes], reader: Reader, call: Call) -> None:
    for event in events:
        if event != LAST:
            kept, meta = reader.read(event)
            if kept or meta:
                call.emit(kept, meta)


def usage_of(document: dict[str, Any]) -> list[int] | None:
    """Return the numbers of prompt, answer and cached prompt tokens; None if there is no ``usage``.

    Reads the ``usage`` of chats, of completions and of the Responses API. Values that are not positive
    integers become 0, because a provider may send any value.
    """
    response = document.get("response")
    usage = document.get("usage") or (response.get("usage") if isinstance(response, dict) else None)
    if not usage or not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else 0
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    answer = usage.get("completion_tokens", usage.get("output_tokens"))
    return [each if type(each) is int and each > 0 else 0 for each in (prompt, answer, cached)]


def error_status(document: dict[str, Any]) -> int | None:
    """Return the HTTP status of an error event in a stream, or 500 if it states none.

    Return None if the event is not an error.
    """
    error = document.get("error")
    if error is None:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 500

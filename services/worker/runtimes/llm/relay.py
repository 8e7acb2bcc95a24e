"""Relay a request to llama.cpp's own HTTP server, and emit the events of the answer."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

from calls import Call, Refused
from llamacpp_events import usage_of


class NoAnswer(Exception):
    """Error for a server that did not answer, or that answered with an error."""


def ask(address: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]) -> Any:
    """Return the server's JSON answer to a short request.

    Raise NoAnswer if the server does not answer, or if it answers with an error. ``body``: the JSON body of a
    POST. If it is None, the request is a GET.
    """
    target = urlsplit(address)
    connection = http.client.HTTPConnection(target.hostname or "", target.port, timeout=10)
    try:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Connection": "close", **headers}
        connection.request("GET" if body is None else "POST", path, content, headers)
        answer = connection.getresponse()
        found = answer.read()
        if answer.status != 200:
            raise NoAnswer(f"{answer.status}: {found[:200]!r}")
        return json.loads(found)
    except (OSError, http.client.HTTPException, ValueError) as problem:
        raise NoAnswer(repr(problem)) from None
    finally:
        connection.close()


def relay(address: str, path: str, body: dict[str, Any], headers: dict[str, str], call: Call) -> None:
    """Send a request to the server at ``address`` and emit its answer until the end.

    If the call is cancelled, the connection is closed. Then the server ends the request. Each request has its
    own connection, because llama.cpp's server closes idle connections without notice.
    """
    target = urlsplit(address)
    connection = http.client.HTTPConnection(target.hostname or "", target.port)
    try:
        connection.connect()
        # Keep a reference to the socket, so that a cancellation can close it. http.client drops its own
        # reference if the server closes the connection after the answer.
        sock = connection.sock
        call.on_cancel(lambda: sock.shutdown(socket.SHUT_RDWR))
        connection.request(
            "POST", path, json.dumps(body).encode(),
            {"Content-Type": "application/json", "Connection": "close", **headers},
        )  # fmt: skip
        answer = connection.getresponse()
        if answer.status == 200 and "text/event-stream" in answer.headers.get("Content-Type", ""):
            _emit_stream(answer, call)
        else:
            _emit_whole(answer.status, answer.read(), call)
    except (OSError, http.client.HTTPException) as problem:
        if not call.cancelled:
            raise Refused(502, f"The engine's server does not answer: {problem!r}", "server_error") from None
    finally:
        connection.close()


def _emit_whole(status: int, body: bytes, call: Call) -> None:
    meta: dict[str, Any] = {} if status == 200 else {"status": status}
    if status == 200 and b'"usage"' in body:
        meta["usage"] = usage_of(json.loads(body))
    call.emit([body], meta)


def _emit_stream(answer: http.client.HTTPResponse, call: Call) -> None:
    for line in answer:
        data = line.strip().removeprefix(b"data:").lstrip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        usage = usage_of(json.loads(data)) if b'"usage"' in data else None
        call.emit([data], {"usage": usage} if usage else {})

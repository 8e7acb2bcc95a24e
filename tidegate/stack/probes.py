"""Probe readiness in each server's own protocol, because a server opens its port before it is ready."""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl

from tidegate.stack.child import Probe

TIMEOUT_S = 1.0


def problem(probe: Probe) -> str | None:
    """Return None if the child is ready, otherwise the reason in a few words.

    The connection attempt and each read block for at most ``TIMEOUT_S`` seconds.
    """
    try:
        match probe.kind:
            case "tcp":
                socket.create_connection((probe.host, probe.port), TIMEOUT_S).close()
                return None
            case "amqp":
                return _answers(probe, b"AMQP\x00\x00\x09\x01", b"\x01\x00\x00")
            case "valkey":
                return _valkey(probe)
            case "http" | "https":
                return _http(probe)
    except OSError:
        return "not answering yet"


def _answers(probe: Probe, greeting: bytes, expected: bytes) -> str | None:
    with socket.create_connection((probe.host, probe.port), TIMEOUT_S) as connection:
        connection.sendall(greeting)
        answer = connection.recv(64)
    return None if answer.startswith(expected) else "starting"


def _valkey(probe: Probe) -> str | None:
    if probe.login is None:
        return _answers(probe, b"PING\r\n", b"+PONG")
    user, password = probe.login[0], probe.login[1].read_text().strip()
    # Also send PING: while Valkey loads its data, AUTH succeeds, but PING is answered with -LOADING.
    return _answers(probe, f"AUTH {user} {password}\r\nPING\r\n".encode(), b"+OK\r\n+PONG")


def _http(probe: Probe) -> str | None:
    connection = http.client.HTTPConnection(probe.host, probe.port, timeout=TIMEOUT_S)
    if probe.kind == "https":
        # Do not verify the certificate. It need not name this address, and the request contains no secret.
        unverified = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection(
            probe.host, probe.port, timeout=TIMEOUT_S, context=unverified
        )
    try:
        connection.request("GET", probe.path, headers=_basic(probe))
        response = connection.getresponse()
        body = response.read(4096)
    except http.client.HTTPException:
        return "not answering yet"
    finally:
        connection.close()
    return None if response.status == 200 else _reason(body)


def _basic(probe: Probe) -> dict[str, str]:
    if probe.login is None:
        return {}
    user, password = probe.login[0], probe.login[1].read_text().strip()
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}


def _reason(body: bytes) -> str:
    try:
        answer = json.loads(body)
    except ValueError:
        return "not ready"
    problems = answer.get("problems") if isinstance(answer, dict) else None
    if isinstance(problems, dict):
        return "; ".join(f"{name}: {text}" for name, text in problems.items() if text) or "not ready"
    return "not ready"

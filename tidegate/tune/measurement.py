"""Measure one run: start the load generator in a separate process, and read its result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from urllib.parse import quote, urlsplit

from tidegate.client.codec import HEAD_LENGTH
from tidegate.client.errors import BadAnswer
from tidegate.kernel.errors import BadRequest
from tidegate.tune.load_generator import CONNECT_TIMEOUT_S, LINGER_S, LoadPlan, LoadResult

# The most seconds that the child process may take to start. This is long, because the model keeps the machine
# busy.
START_LIMIT_S = 20.0


@dataclass(frozen=True, slots=True)
class GatewayAddress:
    """The address of the gateway. ``prefix``: the path before ``/v2``."""

    host: str
    port: int
    tls: bool
    prefix: str

    @classmethod
    def of(cls, url: str) -> GatewayAddress:
        """Return the address in a gateway's URL. Raise BadRequest if the URL is not valid."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise BadRequest(f"TIDEGATE_GATEWAY_URL is not an http(s) URL: {url!r}.")
        tls = parts.scheme == "https"
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, parts.path.rstrip("/"))


def request_bytes(
    address: GatewayAddress, endpoint: str, body: bytes, head_length: int, token: str = ""
) -> bytes:
    """Return the bytes of an inference request. The load generator sends them repeatedly."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    lines = (
        f"POST {address.prefix}/v2/models/{quote(endpoint, safe='')}/infer HTTP/1.1",
        f"Host: {host}:{address.port}",
        f"{HEAD_LENGTH}: {head_length}",
        "Content-Type: application/octet-stream",
        f"Content-Length: {len(body)}",
        *([f"Authorization: Bearer {token}"] if token else []),
    )
    return "\r\n".join((*lines, "", "")).encode() + body


def measure(address: GatewayAddress, request: bytes, connections: int, seconds: float) -> LoadResult:
    """Send load to the endpoint for ``seconds`` after a short warm-up. Return the result.

    Raise BadAnswer if the load generator does not return a result.
    """
    warm_s = min(0.5, seconds / 4)
    plan = LoadPlan(address.host, address.port, address.tls, connections, warm_s, seconds)
    # The load generator runs in its own process group, so Ctrl-C does not reach it. Only this process gets
    # Ctrl-C, and then ends the load generator.
    child = subprocess.Popen(
        [sys.executable, "-m", "tidegate.tune.load_generator"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        limit_s = CONNECT_TIMEOUT_S + warm_s + seconds + LINGER_S + START_LIMIT_S
        out, err = child.communicate(json.dumps(asdict(plan)).encode() + b"\n" + request, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise BadAnswer(
            f"The load generator did not end within {limit_s:g} s. Try again, or use fewer --connections."
        ) from None
    finally:
        _end(child)
    try:
        return LoadResult(**json.loads(out))
    except (ValueError, TypeError):
        last = err.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise BadAnswer(f"The load generator failed: {' '.join(last) or 'no message'}.") from None


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()

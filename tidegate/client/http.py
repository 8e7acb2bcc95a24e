"""Convert between flows and httpx: client options, requests, answers and errors."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import httpx

from tidegate.client.errors import DeadlinePassed, Unreachable
from tidegate.client.flow import Answer, Send
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.certificates import trusted

# How many seconds a client waits after the deadline. The server answers 504 at the deadline, so this limit
# only matters if no answer arrives.
PATIENCE_S = 2.0
# How many seconds an idle connection stays open. This is shorter than the server's idle timeout. Otherwise a
# request could be sent while the server closes the connection, and would be lost.
KEEPALIVE_S = 4.0
CONNECT_TIMEOUT_S = 5.0


def options(url: str, token: str | None, *, cert: str | None = None, ca: str | None = None) -> dict[str, Any]:
    """Return the arguments of httpx's clients. Raise ValueError for an invalid URL.

    ``cert`` and ``ca`` are paths of certificate files. TIDEGATE_TLS_CERT and TIDEGATE_TLS_CA override them.
    """
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"not an http(s) URL: {url!r}")
    # For a server on this machine, ignore the proxy settings of the environment. A proxy could not reach the
    # server, and must not see the requests.
    trust_env = parts.hostname not in {"127.0.0.1", "localhost", "::1"}
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {token}"} if token else {},
        "limits": httpx.Limits(
            max_connections=256, max_keepalive_connections=256, keepalive_expiry=KEEPALIVE_S
        ),
        "trust_env": trust_env,
        "verify": trusted(url, trust_env=trust_env, own=cert, more=ca),
    }


def request_of(client: httpx.Client | httpx.AsyncClient, send: Send) -> httpx.Request:
    """Return the httpx request for a :class:`Send`."""
    limit = send.timeout_s + PATIENCE_S
    timeout = httpx.Timeout(limit, connect=min(limit, CONNECT_TIMEOUT_S))
    return client.build_request(
        send.method, send.path, headers=dict(send.headers), content=send.content, timeout=timeout
    )


def answer_of(response: httpx.Response) -> Answer:
    """Return the :class:`Answer` of a response whose body has been read."""
    return Answer(response.status_code, response.headers, response.content)


def open_answer_of(response: httpx.Response) -> Answer:
    """Return the :class:`Answer` of a response whose body is not read yet."""
    return Answer(response.status_code, response.headers, b"", live=response)


def meaning(error: httpx.HTTPError, what: str, url: str) -> TidegateError:
    """Return the error to throw into a flow after an error of httpx.

    ``what`` and ``url``: the name and the URL of the server that did not answer.
    """
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        return DeadlinePassed(f"{what} at {url} did not answer in time.")
    return Unreachable(f"{what} does not answer at {url}: {error or type(error).__name__}.")

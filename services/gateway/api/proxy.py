"""Serve ``/api/{registry,router,autoscaler}/...``: forward calls to the control plane's services.

The caller needs the scope for the call. Bodies are streamed in both directions. The service receives the
gateway's service token and the caller's name.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote

import httpx
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from tidegate.kernel import telemetry
from tidegate.kernel.errors import (
    BadRequest,
    DeadlinePassed,
    MethodNotAllowed,
    NotFound,
    TidegateError,
    Unauthorized,
    Unavailable,
)
from tidegate.kernel.http.certificates import trusted
from tidegate.kernel.protocol import permissions
from tidegate.kernel.protocol.access import ANONYMOUS, ORIGIN_HEADER, PRINCIPAL_HEADER
from tidegate.kernel.service import caller

log = telemetry.logger(__name__)

PREFIX = "/api"
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
TIMEOUT = httpx.Timeout(300.0, connect=5.0)
# The number of connections to the services is not limited. With a limit, slow callers could use all
# connections and block other callers. The gateway already limits the connections of its callers.
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=20)
# The proxy forwards no body for these methods.
BODILESS = {"GET", "HEAD", "DELETE"}

# Request headers that are not forwarded. They concern only the caller's connection, or the proxy sets them.
_HOPS = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "transfer-encoding", "upgrade", "host", "authorization", "cookie", "origin", "referer", "x-request-id",
    "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest",
    PRINCIPAL_HEADER.decode(), ORIGIN_HEADER.decode(),
}  # fmt: skip
_NOT_BACK = {"connection", "keep-alive", "transfer-encoding", "x-request-id", "date", "server"}


class ControlPlaneProxy:
    """A proxy to the control plane's services. ``urls``: their addresses by name."""

    def __init__(self, urls: Mapping[str, str], service_token: str) -> None:
        self._urls = {name: url.rstrip("/") for name, url in urls.items()}
        self._token = service_token
        self._http: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close the connections to the services."""
        if self._http is not None:
            await self._http.aclose()

    async def __call__(self, request: Request, service: str, rest: str) -> Response:
        """Forward one call.

        Raise a TidegateError if the caller may not make the call, if the path or method is unknown, if the
        request is incomplete, or if the service does not answer.
        """
        if service not in self._urls:
            raise NotFound(f"there is no service {service[:40]!r}; use one of {', '.join(self._urls)}")
        _permit(service, request.method, f"/{rest}")
        answer = await self._send(request, f"{self._urls[service]}/{quote(rest)}", service)
        headers = [(name, value) for name, value in answer.headers.multi_items() if name not in _NOT_BACK]
        response = StreamingResponse(
            answer.aiter_raw(), answer.status_code, background=BackgroundTask(answer.aclose)
        )
        response.raw_headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        return response

    async def _send(self, request: Request, url: str, service: str) -> httpx.Response:
        if self._http is None:
            self._http = httpx.AsyncClient(
                timeout=TIMEOUT, limits=LIMITS, trust_env=False, verify=trusted(*self._urls.values())
            )
        headers = {name: value for name, value in request.headers.items() if name not in _HOPS}
        if request.method in BODILESS:
            headers.pop("content-length", None)
        headers |= caller.onward() | {"authorization": f"Bearer {self._token}"}
        has_body = request.method not in BODILESS and (
            "content-length" in request.headers or "transfer-encoding" in request.headers
        )
        forwarded = self._http.build_request(
            request.method,
            httpx.URL(url, query=request.url.query.encode("latin-1")),
            headers=headers,
            content=_body(request) if has_body else None,
        )
        try:
            return await self._http.send(forwarded, stream=True)
        except ClientDisconnect:
            raise BadRequest("the caller closed the connection before the request was complete") from None
        except httpx.TimeoutException:
            raise DeadlinePassed(f"the {service} did not answer in time") from None
        except httpx.HTTPError as error:
            raise _unreachable(service, error) from error


def _permit(service: str, method: str, path: str) -> None:
    """Raise an error if the caller may not make this call. The service checks the same rules once more."""
    principal = caller.current.get().principal
    if principal is ANONYMOUS:
        raise Unauthorized(
            "the control plane needs a key: send 'Authorization: Bearer <key>' (the CLI: TIDEGATE_API_KEY); "
            "an admin makes one with `tidegate keys create NAME --scope publish`"
        )
    route = permissions.CONTROL[service].methods(path)
    if route is None:
        raise NotFound(f"the {service} has no path {path[:80]!r}; its /openapi.json lists all paths")
    scopes = route[1].get(method)
    if scopes is None:
        allowed = tuple(route[1])
        raise MethodNotAllowed(f"this path accepts {', '.join(allowed)}, not {method}", allowed=allowed)
    # Some routes need no scope when a service of the stack calls them. Callers of the gateway need a scope,
    # because these routes show internal data.
    caller.permit(principal, permissions.LOOK if scopes == (permissions.OPEN,) else scopes)


async def _body(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk


def _unreachable(service: str, error: httpx.HTTPError) -> TidegateError:
    return Unavailable(f"the {service} does not answer: {error or type(error).__name__}", retry_after_s=1.0)

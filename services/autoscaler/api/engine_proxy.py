"""A proxy between the launcher and the container engine. It forwards only the calls that its rules allow."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, quote

import httpx
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from services.autoscaler.domain.engine_rules import StackBounds, content_type, refusal
from tidegate.kernel import telemetry

log = telemetry.logger(__name__)

# A request body may have at most this many bytes. The largest bodies contain an assignment with its
# environment.
MAX_BODY = 16 * 2**20
TIMEOUT = httpx.Timeout(3600.0, connect=5.0)
_FORWARDED = ("x-registry-auth",)
_DROPPED = {"connection", "keep-alive", "transfer-encoding", "date", "server"}


class EngineProxy:
    """An ASGI app that forwards allowed calls of the launcher to the container engine.

    ``socket``: the path of the engine's Unix socket. ``token``: the token that callers must send. If it is
    None, no token is needed, because only the autoscaler can connect.
    """

    def __init__(self, bounds: StackBounds, socket: str, token: str | None) -> None:
        self._bounds = bounds
        self._token = None if token is None else f"Bearer {token}".encode()
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=socket, verify=False),
            base_url="http://engine",
            timeout=TIMEOUT,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            response = await self._respond(Request(scope, receive))
            await response(scope, receive, send)

    async def _respond(self, request: Request) -> Response:
        if not self._authenticated(request):
            return _message(
                401,
                "The proxy of the engine requires the autoscaler's token. See docs/compose.md.",
            )
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return _message(413, f"The body is larger than {MAX_BODY // 2**20} MiB.")
        query = parse_qs(request.url.query, keep_blank_values=True)
        reason = refusal(request.method, request.url.path, query, body, self._bounds)
        if reason is not None:
            log.warning(
                "refused", extra={"method": request.method, "path": request.url.path, "problem": reason}
            )
            return _message(403, f"The proxy of the engine refuses this call: {reason}.")
        return await self._forward(request, body)

    def _authenticated(self, request: Request) -> bool:
        """Return True if the caller sent the token, needs no token, or only sends a health check."""
        if self._token is None or (request.method in ("GET", "HEAD") and request.url.path == "/_ping"):
            return True
        return hmac.compare_digest(request.headers.get("authorization", "").encode(), self._token)

    async def _forward(self, request: Request, body: bytes) -> Response:
        # The rules checked the decoded URL path. Quote this path again, so that the engine reads exactly the
        # path that was checked.
        url = httpx.URL(quote(request.url.path), query=request.url.query.encode("latin-1"))
        kind = content_type(request.url.path)
        headers = {name: value for name, value in request.headers.items() if name in _FORWARDED}
        headers |= {"content-type": kind} if kind else {}
        forwarded = self._http.build_request(request.method, url, headers=headers, content=body or None)
        try:
            response = await self._http.send(forwarded, stream=True)
        except httpx.HTTPError as error:
            return _message(502, f"The engine does not answer: {error or type(error).__name__}.")
        kept = {name: value for name, value in response.headers.items() if name not in _DROPPED}
        return StreamingResponse(
            _raw(response), response.status_code, kept, background=BackgroundTask(response.aclose)
        )


async def _raw(response: httpx.Response) -> AsyncIterator[bytes]:
    async for chunk in response.aiter_raw():
        yield chunk


def _message(status: int, text: str) -> Response:
    return JSONResponse({"message": text}, status)

"""``python -m services.autoscaler engine-proxy``: holds the engine's socket, passes on what rules allow."""

from __future__ import annotations

import hmac
import json
from collections.abc import AsyncIterator
from functools import partial
from urllib.parse import parse_qs, quote

import httpx
import uvicorn
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from services.autoscaler.domain.engine_rules import StackBounds, content_type, refusal
from services.autoscaler.settings import AutoscalerSettings
from tidegate.kernel import telemetry
from tidegate.kernel.http.connections import Connections
from tidegate.kernel.http.patience import HttpLimits
from tidegate.kernel.http.protocol import Protocol
from tidegate.kernel.protocol.access import engine_token

log = telemetry.logger(__name__)

# The largest is an assignment with its environment.
MAX_BODY = 16 * 2**20
TIMEOUT = httpx.Timeout(3600.0, connect=5.0)
_PASSED = ("x-registry-auth",)
_NOT_BACK = {"connection", "keep-alive", "transfer-encoding", "date", "server"}


class EngineProxy:
    """An ASGI app between the launcher and the engine at the Unix socket ``socket``.

    ``token``: what a caller must send; None: the network lets nobody but the autoscaler in.
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
            response = await self._answer(Request(scope, receive))
            await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if not self._knows(request):
            return _message(
                401,
                "The proxy in front of the engine needs the token of the autoscaler: see docs/compose.md.",
            )
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                return _message(413, "the body is too large")
        query = parse_qs(request.url.query, keep_blank_values=True)
        why_not = refusal(request.method, request.url.path, query, body, self._bounds)
        if why_not is not None:
            log.warning(
                "refused", extra={"method": request.method, "path": request.url.path, "problem": why_not}
            )
            return _message(403, f"The proxy in front of the engine refuses this: {why_not}.")
        return await self._pass_on(request, body)

    def _knows(self, request: Request) -> bool:
        """Return whether the caller may ask at all; a ping is what health checks send."""
        if self._token is None or (request.method in ("GET", "HEAD") and request.url.path == "/_ping"):
            return True
        return hmac.compare_digest(request.headers.get("authorization", "").encode(), self._token)

    async def _pass_on(self, request: Request, body: bytes) -> Response:
        # Quoted anew from what was judged, so that engine and rules read the same path.
        url = httpx.URL(quote(request.url.path), query=request.url.query.encode("latin-1"))
        kind = content_type(request.url.path)
        headers = {name: value for name, value in request.headers.items() if name in _PASSED}
        headers |= {"content-type": kind} if kind else {}
        asked = self._http.build_request(request.method, url, headers=headers, content=body or None)
        try:
            answer = await self._http.send(asked, stream=True)
        except httpx.HTTPError as error:
            return _message(502, f"The engine does not answer: {error or type(error).__name__}.")
        kept = {name: value for name, value in answer.headers.items() if name not in _NOT_BACK}
        return StreamingResponse(
            _raw(answer), answer.status_code, kept, background=BackgroundTask(answer.aclose)
        )


async def _raw(answer: httpx.Response) -> AsyncIterator[bytes]:
    async for chunk in answer.aiter_raw():
        yield chunk


def _message(status: int, text: str) -> Response:
    return JSONResponse({"message": text}, status)


def bounds_of(settings: AutoscalerSettings) -> StackBounds:
    """What the launcher of these settings may do."""
    return StackBounds(
        stack=settings.docker_stack,
        images=(settings.docker_image, *settings.docker_images),
        network=settings.docker_network,
        volumes=frozenset(settings.docker_volumes),
        log_drivers=frozenset({"json-file", settings.docker_log_driver}),
    )


def token_of(settings: AutoscalerSettings) -> str | None:
    """Return the token that callers must send; None where the settings say that none is needed.

    Raises SystemExit where there is nothing to derive it from.
    """
    if settings.service_token:
        return engine_token(settings.service_token)
    if settings.engine_proxy_open:
        return None
    raise SystemExit(
        "tidegate engine-proxy: no service token. Set TIDEGATE_SERVICE_TOKEN or TIDEGATE_STATE_DIR to the "
        "autoscaler's, or TIDEGATE_ENGINE_PROXY_OPEN=true on a network that only the autoscaler is on."
    )


def run(settings: AutoscalerSettings) -> None:
    """Serve until told to stop."""
    bounds = bounds_of(settings)
    shown = {"stack": bounds.stack, "images": list(bounds.images), "network": bounds.network}
    log.info("between the launcher and the engine", extra={"bounds": json.dumps(shown)})
    proxy = EngineProxy(bounds, settings.engine_socket, token_of(settings))
    connections = Connections(HttpLimits.of(settings))
    connections.fit_files()
    protocol = partial(Protocol, connections=connections)
    uvicorn.run(
        proxy, http=protocol, ws="none",  # type: ignore[arg-type]
        host=settings.host, port=settings.engine_proxy_port, log_config=None, access_log=False,
        server_header=False, lifespan="off", timeout_graceful_shutdown=5,
    )  # fmt: skip

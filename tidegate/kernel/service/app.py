"""The frame of every service: its start, health, error answers, and stop."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import Any

import orjson
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidegate.kernel import errors, quick_start, telemetry
from tidegate.kernel.broker import connection as broker
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.answers import error_body as error_body
from tidegate.kernel.http.answers import new_request_id as new_request_id
from tidegate.kernel.http.connections import Connections
from tidegate.kernel.http.heads import LOOPBACK as LOOPBACK
from tidegate.kernel.http.heads import is_local, without_page
from tidegate.kernel.http.protocol import Protocol
from tidegate.kernel.http.timeouts import HttpLimits
from tidegate.kernel.protocol import access
from tidegate.kernel.protocol import permissions as tables
from tidegate.kernel.protocol.access import ANONYMOUS, Principal
from tidegate.kernel.protocol.permissions import OPEN, RoutePermissions, has_control_character
from tidegate.kernel.protocol.redaction import for_caller, without_paths
from tidegate.kernel.service import caller
from tidegate.kernel.service.caller import Caller, ServiceToken
from tidegate.kernel.settings.base import Settings

log = telemetry.logger(__name__)

STATUS: dict[type[TidegateError], int] = {
    errors.BadRequest: 400,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.Conflict: 409,
    errors.PayloadTooLarge: 413,
    errors.TooMany: 429,
    errors.ModelFailed: 500,
    errors.Overloaded: 503,
    errors.NoCapacity: 503,
    errors.ColdStart: 503,
    errors.NoRoutes: 503,
    errors.Unavailable: 503,
    errors.DeadlinePassed: 504,
}

METRICS = "/metrics"
DOCS = "/docs"
# Paths that are called all the time. Successful calls are not logged.
QUIET = ("/health/", METRICS, DOCS, "/openapi.json")
# How long a TLS connection may take to close while the service stops.
GOODBYE_S = 1.0
LONGEST_PATH = 500

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]
# Return the principal of a request's headers. Raises Unauthorized.
Identify = Callable[[dict[bytes, bytes]], Principal]


def status_of(error: TidegateError) -> int:
    """Return the HTTP status code of an error: that of its nearest base class with one, else 500."""
    return next((STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), 500)


class Health:
    """The named checks of ``/health/ready``. Each returns None if all is well, else the problem."""

    def __init__(self) -> None:
        self._checks: dict[str, Callable[[], str | None]] = {}

    def add(self, name: str, check: Callable[[], str | None]) -> None:
        """Register a check. It must be quick and must not block."""
        self._checks[name] = check

    def problems(self) -> dict[str, str]:
        """Return the current problems, by check."""
        found = {name: check() for name, check in self._checks.items()}
        return {name: problem for name, problem in found.items() if problem is not None}


class Guard:
    """ASGI middleware that checks each request and logs it: request id, origin, credential and scope.

    Loopback is not a trust boundary, because a page in a browser can post to it. So a request with a foreign
    ``Host`` (DNS rebinding), ``Origin`` or ``Sec-Fetch-Site`` is refused, except for pages of ``origins``.
    Every route that is not open needs a credential that ``identify`` accepts, such as the service token. Its
    principal, or the one that a service calls for, needs a scope that opens the route in ``permissions``. A
    path that is not in the table gets "not found".
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        permissions: RoutePermissions,
        identify: Identify | None,
        origins: Container[object],
    ) -> None:
        self._app = app
        self._token = ServiceToken(settings.service_token)
        self._identify = identify or self._token.identify
        self._permissions = permissions
        self._local = settings.host in LOOPBACK
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["path"] = without_slash(scope["path"])  # in place, because an outer middleware reads it
        headers = without_page(dict(scope["headers"]), self._origins)
        rid = telemetry.shown_id(headers.get(b"x-request-id", b"")) or new_request_id()
        mark, caller_mark = telemetry.request_id.set(rid), caller.current.set(caller.OWN_WORK)
        started, status, answering, named = time.perf_counter(), 500, False, ""

        async def send_with_id(message: Message) -> None:
            nonlocal status, answering
            if message["type"] == "http.response.start":
                status, answering = message["status"], True
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", rid.encode("latin-1"))],
                }
            await send(message)

        try:
            try:
                who = self._admit(scope["method"], scope["path"], headers)
            except TidegateError as refusal:
                await error_response(refusal, rid)(scope, receive, send_with_id)
            else:
                named = who.id
                caller.current.set(Caller(who, self._origin(scope, headers)))
                await self._app(scope, receive, send_with_id)
        except Exception as error:
            # A handler of the framework would answer outside of this middleware, without the request id.
            log.error("unexpected error", exc_info=error)
            if answering:
                raise
            await _broken(rid)(scope, receive, send_with_id)
        finally:
            quiet = status < 400 and (scope["method"] == "GET" or scope["path"].startswith(QUIET))
            log.log(
                10 if quiet else 20,
                "request",
                extra={
                    "method": scope["method"],
                    "path": scope["path"][:LONGEST_PATH],
                    "status": status,
                    "caller": named,
                    "ms": round((time.perf_counter() - started) * 1e3, 2),
                },
            )
            telemetry.request_id.reset(mark)
            caller.current.reset(caller_mark)

    def _admit(self, method: str, path: str, headers: dict[bytes, bytes]) -> Principal:
        if self._local and not is_local(headers):
            raise errors.Forbidden(
                "This address answers only to local callers: the Host, Origin or Sec-Fetch-Site header is "
                "missing or foreign."
            )
        found = self._permissions.methods(path)
        scopes = found[1].get(method) if found is not None else None
        if scopes == (OPEN,):
            return ANONYMOUS
        who = self._identify(headers)
        if has_control_character(path):
            raise errors.BadRequest("the path has a control character; names cannot have any")
        if found is None:
            raise errors.NotFound(f"there is no path {path[:80]!r} here; /openapi.json lists all paths")
        if scopes is None:
            allowed = tuple(found[1])
            raise errors.MethodNotAllowed(
                f"this path accepts {', '.join(allowed)}, not {method[:20]}", allowed=allowed
            )
        return caller.permit(who, scopes)

    def _origin(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        told = headers.get(access.ORIGIN_HEADER)
        if told is not None and self._token.given(headers):
            return told.decode("latin-1")[:64]
        client = scope.get("client")
        return str(client[0]) if client else ""


def without_slash(path: str) -> str:
    """Return a path without its trailing slash: ``/v2/`` is ``/v2``, as for Triton."""
    return path[:-1] if path.endswith("/") and len(path) > 1 else path


def error_response(error: TidegateError, rid: str) -> Response:
    """Return an error as an HTTP answer, with ``Retry-After`` in whole seconds if the error has one."""
    message, headers = for_caller(error), {}
    if message != error.message:
        log.warning("an answer leaves out paths", extra={"problem": error.message, "request_id": rid})
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(errors.whole_seconds(error.retry_after_s))
    if isinstance(error, errors.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.MethodNotAllowed) and error.allowed:
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, errors.TooMany):
        headers |= error.headers
    return _json(error_body(message, error.reason, rid), status_of(error), headers)


def bare_app(
    *, name: str, settings: Settings, lifespan: Lifespan, permissions: RoutePermissions | None = None
) -> Starlette:
    """Return the app of a service that answers only health and metrics. Others use ``service.api``.

    It does without FastAPI, which takes a quarter of a worker's import time.
    """
    app = Starlette(routes=[Route(path, answer) for path, answer in OWN_PATHS.items()], lifespan=lifespan)
    furnish(app, name=name, settings=settings, permissions=permissions)
    return app


def furnish(
    app: Starlette,
    *,
    name: str,
    settings: Settings,
    permissions: RoutePermissions | None = None,
    identify: Identify | None = None,
    origins: Container[object] = frozenset(),
) -> None:
    """Add health, guard and error answers to an app.

    ``identify`` returns the principal of a request's headers; None: only the service token is accepted.
    ``permissions`` None: the table of the service ``name``. Pages of ``origins`` may call.
    """
    if settings.holds_service_token and not settings.service_token:
        raise SystemExit(
            f"tidegate {name}: no service token. Set TIDEGATE_SERVICE_TOKEN, or write one to "
            f"{settings.state_path / 'token'} (`tidegate up` does)."
        )
    app.state.health = Health()
    app.add_exception_handler(TidegateError, _on_tidegate_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(
        Guard,
        settings=settings,
        permissions=permissions or tables.SERVICES[name],
        identify=identify,
        origins=origins,
    )


async def live(_: Request) -> Response:
    """Answer that the process is alive."""
    return _json({"status": "live"}, 200)


async def ready(request: Request) -> Response:
    """Answer whether the service is ready; if not, with 503 and the problems."""
    found: dict[str, str] = request.app.state.health.problems()
    problems = {name: without_paths(problem) for name, problem in found.items()}
    told = {"status": "not ready" if problems else "ready", "problems": problems}
    return _json(told, 503 if problems else 200)


async def metrics(_: Request) -> Response:
    """Answer with the metrics, in the format of Prometheus."""
    return Response(generate_latest(_registry()), media_type=CONTENT_TYPE_LATEST)


OWN_PATHS = {"/health/live": live, "/health/ready": ready, METRICS: metrics}


def _registry() -> CollectorRegistry:
    """Return the metrics of this process, or of all processes of a service that runs as several."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return together


async def _on_tidegate_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, TidegateError)
    return error_response(error, telemetry.request_id.get())


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = "not_found" if error.status_code == 404 else "http"
    body = error_body(str(error.detail), reason, telemetry.request_id.get())
    return _json(body, error.status_code, error.headers)


def _broken(rid: str) -> Response:
    return _json(error_body("Internal error; see the log of the service.", "internal", rid), 500)


def _json(body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, dict(headers or {}), "application/json")


def run(
    app: ASGIApp,
    settings: Settings,
    port: int,
    *,
    sock: socket.socket | None = None,
    protocol: Callable[..., Any] = Protocol,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    tls: ssl.SSLContext | None = None,
    other_connections: int = 0,
) -> None:
    """Serve until SIGTERM or SIGINT. Requests in flight get up to 30 s, then ``lifespan`` shuts down.

    ``sock`` is a bound socket to use instead of ``port``. ``protocol`` is a factory of the service's own
    :class:`Protocol`. ``on_stop`` runs first, while connections are still served. With ``tls`` the service
    speaks TLS. ``other_connections`` is the number of connections on other ports.
    """
    broker.use_driver(settings.amqp_driver)
    os.umask(0o077)  # only the service's user may read what it writes
    connections = Connections(HttpLimits.of(settings))
    connections.fit_files(other_connections)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=port,
        loop="uvloop",
        http=partial(protocol, connections=connections),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=30,
        server_header=False,
        proxy_headers=False,
        backlog=4096,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
    _Server(config, on_stop).run([sock] if sock is not None else None)


class _Server(uvicorn.Server):
    """Uvicorn with a first step of shutdown that runs while connections are still served."""

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], Awaitable[None]] | None) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    async def startup(self, sockets: Any = None) -> None:
        """Exclude everything that is loaded from garbage collection, then start."""
        quick_start.loaded()
        await super().startup(sockets)

    async def shutdown(self, sockets: Any = None) -> None:
        try:
            if self._on_stop is not None:
                await self._on_stop()
        finally:
            cutting = asyncio.create_task(self._cut_closing()) if self.config.ssl else None
            await super().shutdown(sockets)
            if cutting is not None:
                cutting.cancel()

    async def _cut_closing(self) -> None:
        """Abort TLS connections that are closing, because an idle client never answers the close."""
        while True:
            await asyncio.sleep(GOODBYE_S)
            for connection in list(self.server_state.connections):
                transport = getattr(connection, "transport", None)
                if transport is not None and transport.is_closing():
                    transport.abort()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do not raise the signal again after an orderly stop, which a supervisor would read as a crash."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

"""The common parts of every service: start, health, error answers, and stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Container, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from functools import partial
from typing import Any

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tidegate.kernel import quick_start, telemetry
from tidegate.kernel.broker import connection as broker
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.http.answers import error_body
from tidegate.kernel.http.connections import Connections
from tidegate.kernel.http.protocol import Protocol
from tidegate.kernel.http.timeouts import HttpLimits
from tidegate.kernel.protocol import permissions as tables
from tidegate.kernel.protocol.permissions import RoutePermissions
from tidegate.kernel.protocol.redaction import without_paths
from tidegate.kernel.service.error_answers import error_response, json_answer
from tidegate.kernel.service.guard import AnswerError, Guard, Identify
from tidegate.kernel.settings.base import Settings

METRICS = "/metrics"
DOCS = "/docs"
# The seconds that a TLS connection may take to close while the service stops.
GOODBYE_S = 1.0
# After SIGUSR1, idle connections are closed after ``RETIRE_S`` seconds. From then on, streams may continue
# for at most ``RETIRED_STREAMS_S`` seconds.
RETIRE_S = 5.0
RETIRED_STREAMS_S = 600

Lifespan = Callable[[Any], AbstractAsyncContextManager[None]]


class Health:
    """The named checks of ``/health/ready``. Each returns None, or the problem that it found."""

    def __init__(self) -> None:
        self._checks: dict[str, Callable[[], str | None]] = {}

    def add(self, name: str, check: Callable[[], str | None]) -> None:
        """Register a check. It must be quick and must not block."""
        self._checks[name] = check

    def problems(self) -> dict[str, str]:
        """Return the current problems, by the name of the check."""
        found = {name: check() for name, check in self._checks.items()}
        return {name: problem for name, problem in found.items() if problem is not None}


def bare_app(
    *, name: str, settings: Settings, lifespan: Lifespan, permissions: RoutePermissions | None = None
) -> Starlette:
    """Return the app of a service that serves only health and metrics. Other services use ``service.api``.

    This function does not import FastAPI, which would take a quarter of a worker's import time.
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
    answer_error: AnswerError | None = None,
) -> None:
    """Add to an app its health state, the check of callers (:class:`Guard`), and the form of error answers.

    - ``identify``: a function that returns the principal of a request's headers; None: only the service token
      is accepted.
    - ``permissions``: the table of scopes; None: that of the service ``name``.
    - ``origins``: the origins of browser pages that may call the app.
    - ``answer_error``: a function that makes the answer to a failed request; None: the answer has Tidegate's
      format.
    """
    if settings.holds_service_token and not settings.service_token:
        raise SystemExit(
            f"tidegate {name}: no service token. Set TIDEGATE_SERVICE_TOKEN, or write one to "
            f"{settings.state_path / 'token'} (`tidegate up` does)."
        )
    app.state.health = Health()
    app.state.answer_error = answer_error
    app.add_exception_handler(TidegateError, _on_tidegate_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_middleware(
        Guard,
        settings=settings,
        permissions=permissions or tables.SERVICES[name],
        identify=identify,
        origins=origins,
        answer_error=answer_error,
    )


async def live(_: Request) -> Response:
    """Answer that the process is alive."""
    return json_answer({"status": "live"}, 200)


async def ready(request: Request) -> Response:
    """Answer 200 if the service is ready, else 503 with the problems."""
    found: dict[str, str] = request.app.state.health.problems()
    problems = {name: without_paths(problem) for name, problem in found.items()}
    told = {"status": "not ready" if problems else "ready", "problems": problems}
    return json_answer(told, 503 if problems else 200)


async def metrics(_: Request) -> Response:
    """Answer with the metrics, in the format of Prometheus."""
    return Response(generate_latest(_registry()), media_type=CONTENT_TYPE_LATEST)


OWN_PATHS = {"/health/live": live, "/health/ready": ready, METRICS: metrics}


def _registry() -> CollectorRegistry:
    """Return the metrics of this process. If the service has several processes, return the metrics of all."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    together = CollectorRegistry()
    MultiProcessCollector(together)  # type: ignore[no-untyped-call]
    return together


async def _on_tidegate_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TidegateError)
    return answered(request, error)


def answered(request: Request, error: TidegateError) -> Response:
    """Return an error as an answer, in the format of the API to which the request's path belongs."""
    rid, answer_error = telemetry.request_id.get(), request.app.state.answer_error
    if answer_error is None:
        return error_response(error, rid)
    answer: Response = answer_error(request.url.path, error, rid)
    return answer


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = "not_found" if error.status_code == 404 else "http"
    body = error_body(str(error.detail), reason, telemetry.request_id.get())
    return json_answer(body, error.status_code, error.headers)


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
    busy: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until SIGTERM or SIGINT, then shut down.

    Requests in flight get up to 30 s to finish. After that, the lifespan of ``app`` shuts down.

    - ``sock``: a bound socket to use instead of ``port``.
    - ``protocol``: a factory of the service's own :class:`Protocol`.
    - ``on_stop``: a function to call before the shutdown, while connections are still served.
    - ``tls``: the TLS context; None: serve without TLS.
    - ``other_connections``: the maximum number of this process's connections on other ports. They count
      against the limit of open files.
    - ``busy``: a function that returns True while connections on other ports have calls in flight. After
      SIGUSR1, the server waits for these calls.
    """
    prepare(settings)
    server = server_of(
        app,
        settings,
        port,
        protocol=protocol,
        on_stop=on_stop,
        tls=tls,
        other_connections=other_connections,
        busy=busy,
    )
    server.run([sock] if sock is not None else None)


def prepare(settings: Settings) -> None:
    """Set the AMQP driver and the umask of this process."""
    broker.use_driver(settings.amqp_driver)
    os.umask(0o077)  # only this process's user may read files that it creates


def server_of(
    app: ASGIApp,
    settings: Settings,
    port: int,
    *,
    protocol: Callable[..., Any] = Protocol,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    tls: ssl.SSLContext | None = None,
    other_connections: int = 0,
    busy: Callable[[], bool] = lambda: False,
    signals: bool = True,
) -> Server:
    """Return a server that is not started yet.

    ``signals``: True if the server stops on SIGTERM and SIGINT. The other parameters are those of
    :func:`run`.
    """
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
    return Server(config, on_stop, connections, busy, signals=signals)


class Server(uvicorn.Server):
    """A uvicorn server that calls ``on_stop`` before its shutdown, while it still serves connections.

    SIGUSR1 means that another process of the service accepts new connections from now on. Then the server
    answers the requests on its connections, closes each connection after its next response, and stops.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_stop: Callable[[], Awaitable[None]] | None,
        connections: Connections,
        busy: Callable[[], bool],
        *,
        signals: bool,
    ) -> None:
        super().__init__(config)
        self._on_stop = on_stop
        self._connections = connections
        self._busy = busy
        self._signals = signals
        self._retirement: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Start the server.

        From now on, the garbage collector ignores all objects that exist already, and SIGUSR1 retires the
        server.
        """
        quick_start.loaded()
        if self._signals and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._retire)
        await super().startup(sockets)

    def _retire(self) -> None:
        if not self.started:
            self.should_exit = True  # it has no connections yet
        elif self._retirement is None:
            self._retirement = asyncio.create_task(self._retired())

    async def _retired(self) -> None:
        """Accept no new connections, close each present connection after its next response, and stop.

        The response says ``Connection: close``, so the caller sends no further request on this connection.
        Without this header, a request that is on its way would be lost. A connection without a request is
        closed after ``RETIRE_S`` seconds.
        """
        for server in self.servers:
            server.close()
        if self._on_stop is not None:
            await self._on_stop()
        self._connections.retiring = True
        for connection in self.server_state.connections:
            cycle = getattr(connection, "cycle", None)
            if cycle is not None and not cycle.response_complete:
                cycle.keep_alive = False
        await asyncio.sleep(RETIRE_S)
        for connection in list(self.server_state.connections):
            connection.shutdown()
        cutting = asyncio.create_task(self._cut_closing())
        end = time.monotonic() + RETIRED_STREAMS_S
        while (self.server_state.connections or self._busy()) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        cutting.cancel()
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        try:
            if self._on_stop is not None:
                await self._on_stop()
        finally:
            cutting = asyncio.create_task(self._cut_closing())
            await super().shutdown(sockets)
            cutting.cancel()

    async def _cut_closing(self) -> None:
        """Abort TLS connections that are closing.

        An idle client does not answer the closing message of TLS. Without an abort, the service would wait
        for this answer before it stops.
        """
        while self.config.ssl:
            await asyncio.sleep(GOODBYE_S)
            for connection in list(self.server_state.connections):
                transport = getattr(connection, "transport", None)
                if transport is not None and transport.is_closing():
                    transport.abort()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT. Unlike uvicorn, do not raise them again after an orderly stop.

        A signal that is raised again would end the process, and a supervisor would take this for a crash.
        """
        if not self._signals:
            yield
            return
        with super().capture_signals():
            yield
            self._captured_signals.clear()

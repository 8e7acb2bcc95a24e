"""The gRPC server of a gateway process: listen, drain, and end stalled connections."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.grpc.connection import GrpcConnection
from services.gateway.api.grpc.frames import ErrorCode
from services.gateway.api.grpc.health import HealthService
from services.gateway.api.grpc.server_call import MethodSpec, ServerCall
from services.gateway.api.grpc.server_state import ServerState
from tidegate.kernel import telemetry
from tidegate.kernel.errors import DeadlinePassed, TidegateError
from tidegate.kernel.protocol.access import Principal

log = telemetry.logger(__name__)

# After a drain begins, calls in flight may take at most this many seconds. HTTP has the same limit.
GRACE_S = 30.0
BACKLOG = 4096
HANDSHAKE_S, GOODBYE_S = 10.0, 1.0
SWEEP_S = 5.0
# How many seconds a client may be silent. HALFWAY_S: while a frame is incomplete. The other two: while no
# call is in flight. STRANGER_S: if the connection never had a call that needs a credential. IDLE_S: if it had
# one.
HALFWAY_S = 20.0
STRANGER_S = 60.0
IDLE_S = 600.0
# A message may take STALL_S, plus the time for its size at the slowest allowed rate. A response may stay
# unread for UNREAD_S.
STALL_S = 30.0
SLOWEST_BYTES_A_SECOND = 64 * 1024
UNREAD_S = 60.0
# Handlers end their calls at the deadline. The sweep ends a call that is still open this long after its
# deadline.
LATE_S = 1.0


class GrpcService(Protocol):
    """The part of a gRPC service that the server uses."""

    def methods(self) -> dict[str, MethodSpec]:
        """Return all methods, each under its path."""


class GrpcServer:
    """A gRPC server of ``services`` and ``health``.

    ``shared_port``: True if other gateway processes listen on the same port. ``sock``: a bound socket to use
    instead of ``host`` and ``port``.
    """

    def __init__(
        self,
        services: Sequence[GrpcService],
        health: HealthService,
        *,
        host: str,
        port: int,
        authenticate: Callable[[dict[bytes, bytes]], Principal],
        limits: BodyLimits,
        refused: Callable[[TidegateError, str], None],
        max_connections: int,
        shared_port: bool,
        sock: socket.socket | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._health = health
        methods = {path: method for each in (*services, health) for path, method in each.methods().items()}
        self._shared = ServerState(
            methods=methods,
            authenticate=authenticate,
            limits=limits,
            refused=refused,
            max_connections=max_connections,
        )
        self._connections: set[GrpcConnection] = set()
        self._at = host, port
        self._shared_port = shared_port
        self._socket = sock
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen; raise OSError if the port is in use."""
        host, port = self._at
        place: dict[str, Any] = {"host": host, "port": port, "reuse_port": self._shared_port or None}
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            partial(GrpcConnection, self._shared, self._connections),
            **(place if self._socket is None else {"sock": self._socket}),
            ssl=self._tls,
            ssl_handshake_timeout=None if self._tls is None else HANDSHAKE_S,
            ssl_shutdown_timeout=None if self._tls is None else GOODBYE_S,
            backlog=BACKLOG,
        )
        self._sweeper = asyncio.create_task(sweep_all(self._connections))

    @property
    def busy(self) -> bool:
        """Return True while a connection is open.

        During a drain, a connection ends after its last call.
        """
        return bool(self._connections)

    def drain(self) -> None:
        """Accept no more calls. Calls in flight continue."""
        self._health.stopping = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.drain()

    async def stop(self) -> None:
        """Accept no more calls, wait at most ``GRACE_S`` seconds for the calls in flight, and close."""
        self.drain()
        if self._sweeper is None:
            return
        connections = self._connections
        end = asyncio.get_running_loop().time() + GRACE_S
        while connections and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)
        self._sweeper.cancel()
        for connection in list(connections):
            connection.abort()


async def sweep_all(connections: set[GrpcConnection]) -> None:
    """Check all connections every ``SWEEP_S`` seconds, without an end.

    If the check of a connection raises an error, close only that connection.
    """
    while True:
        await asyncio.sleep(SWEEP_S)
        now = asyncio.get_running_loop().time()
        for connection in list(connections):
            try:
                sweep(connection, now)
            except Exception:
                log.exception("cannot check a gRPC connection; closing it")
                connection.abort()


def sweep(connection: GrpcConnection, now: float) -> None:
    """End a connection that is stalled or idle for too long.

    If only some calls of the connection are stalled, end only these calls.
    """
    silent = now - connection.active
    if silent > UNREAD_S and (connection.closing or (connection.paused and not connection.calls)):
        connection.abort()  # not `end`: the client does not read, so it would not get the reason
    elif connection.halfway and silent > HALFWAY_S:
        connection.end(ErrorCode.PROTOCOL_ERROR, "a frame was not completed in time")
    elif (
        not connection.calls
        and not connection.closing
        and silent > (IDLE_S if connection.known else STRANGER_S)
    ):
        connection.end(ErrorCode.NO_ERROR, "idle")
    for call in list(connection.calls.values()):
        _sweep_call(connection, call, now)


def _sweep_call(connection: GrpcConnection, call: ServerCall, now: float) -> None:
    if call.unsent_bytes and now - call.sent_at > UNREAD_S:
        connection.reset(call, ErrorCode.CANCEL)
    elif call.receiving and now - call.message_began_at > STALL_S + call.reader.size / SLOWEST_BYTES_A_SECOND:
        call.fail(DeadlinePassed("the message did not arrive in time"))
    elif call.deadline is not None and now > call.deadline + LATE_S:
        call.fail(DeadlinePassed("the deadline of the call passed"))

"""The gRPC server of a gateway process."""

from __future__ import annotations

from typing import Any

import grpc

from services.gateway.api.grpc.health import HealthService
from services.gateway.api.grpc.service import InferenceService
from tidegate import telemetry

log = telemetry.logger(__name__)

# What is under way may end; the same as over HTTP.
GRACE_S = 30.0


class GrpcDoor:
    """Listens from :meth:`start` to :meth:`stop`; ``shared``: other processes listen on the port too."""

    def __init__(
        self,
        inference: InferenceService,
        health: HealthService,
        *,
        address: str,
        max_bytes: int,
        shared: bool,
    ) -> None:
        self._inference = inference
        self._health = health
        self._address = address
        # The size of a message with a body of the limit, and some room for its head.
        self._options = [
            ("grpc.max_receive_message_length", max_bytes + 64 * 1024),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", int(shared)),
            # Clients may ping as often as they like, calls or none.
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_ping_strikes", 0),
        ]
        self._server: Any = None

    async def start(self) -> None:
        """Listen; raises OSError when the port is taken."""
        server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers((self._inference.handler(), self._health.handler()))
        try:
            server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise OSError(f"cannot listen for gRPC on {self._address}: {error}") from error
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Take no more calls, let those under way end, close."""
        self._health.stopping = True
        if self._server is not None:
            await self._server.stop(GRACE_S)

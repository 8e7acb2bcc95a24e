"""The standard health service, ``grpc.health.v1.Health``."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import StatusCode
from grpc_health.v1 import health_pb2 as pb

from services.gateway.api.grpc.server_call import MethodSpec
from services.gateway.api.grpc.service import NAME as INFERENCE
from services.gateway.api.grpc.service import OPEN_BYTES
from tidegate.kernel.service.app import Health

NAME = "grpc.health.v1.Health"
POLL_S = 0.5

_SERVED = {"", INFERENCE}
_STATUS = pb.HealthCheckResponse


class HealthService:
    """The health service; it reports the same state as ``/health/ready``."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self.stopping = False

    def methods(self) -> dict[str, MethodSpec]:
        """Return the two methods (Check and Watch), each under its path."""
        request = pb.HealthCheckRequest
        return {
            f"/{NAME}/Check": MethodSpec(self._check, request, OPEN_BYTES, open=True),
            f"/{NAME}/Watch": MethodSpec(self._watch, request, OPEN_BYTES, open=True, lasting=True),
        }

    def _status(self) -> int:
        healthy = not self.stopping and not self._health.problems()
        status: int = _STATUS.SERVING if healthy else _STATUS.NOT_SERVING
        return status

    async def _check(self, request: Any, context: Any) -> Any:
        if request.service not in _SERVED:
            return await context.abort(StatusCode.NOT_FOUND, f"there is no service {request.service!r}")
        return _STATUS(status=self._status())

    async def _watch(self, request: Any, context: Any) -> None:
        known = request.service in _SERVED
        last = None
        while not self.stopping:
            status = self._status() if known else _STATUS.SERVICE_UNKNOWN
            if status != last:
                last = status
                await context.write(_STATUS(status=status))
            await asyncio.sleep(POLL_S)

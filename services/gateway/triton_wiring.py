"""Build the parts of Triton's API except inference: model control, shared memory, trace and log settings."""

from __future__ import annotations

import os

from fastapi import APIRouter

from services.gateway import processes
from services.gateway.adapters.autoscaler_client import AutoscalerClient
from services.gateway.adapters.shared_regions import SharedRegions
from services.gateway.api.body_limits import BodyLimits
from services.gateway.api.grpc.management import ManagementMethods
from services.gateway.api.model_control import ModelControlRoutes
from services.gateway.api.server_settings import ServerSettings, ServerSettingsRoutes
from services.gateway.api.shared_memory import SharedMemoryRoutes
from services.gateway.application.inference.beside_body import BesideBody
from services.gateway.application.inference.core import InferenceCore
from services.gateway.application.model_control import ModelControl
from services.gateway.settings import GatewaySettings
from tidegate.kernel.protocol.access import INFER, OPERATE
from tidegate.kernel.protocol.permissions import GATEWAY, RoutePermissions


class TritonWiring:
    """The parts for Triton's extensions.

    ``beside``: reads the parts of a request that are not in its body. ``control``: loads and scales models.
    """

    def __init__(
        self, settings: GatewaySettings, core: InferenceCore, limits: BodyLimits, *, traced: bool
    ) -> None:
        self._autoscaler = AutoscalerClient(settings.autoscaler_url, settings.service_token)
        regions = _regions(settings, limits)
        self.beside = BesideBody(regions, settings.header_forward_pattern)
        self.control = ModelControl(core, self._autoscaler, settings.model_control)
        shown = ServerSettings(settings.log_level, core, traced=traced)
        self.methods = ManagementMethods(self.control, regions, shown)
        self.routers: list[APIRouter] = [
            ModelControlRoutes(self.control).router,
            SharedMemoryRoutes(regions).router,
            ServerSettingsRoutes(shown).router,
        ]

    async def stop(self) -> None:
        """Close the connections to the autoscaler."""
        await self._autoscaler.close()


def permissions_of(settings: GatewaySettings) -> RoutePermissions:
    """Return the scopes that each route needs. A setting may open model control to all callers."""
    if settings.model_control != "infer":
        return GATEWAY
    routes = [f"POST /v2/repository/models/{{model}}/{action}" for action in ("load", "unload")]
    routes += [f"PUT /models/{{model}}{part}" for part in ("", "/{version}")]
    return RoutePermissions({**GATEWAY.table, **dict.fromkeys(routes, (INFER, OPERATE))})


def _regions(settings: GatewaySettings, limits: BodyLimits) -> SharedRegions | None:
    if settings.shared_memory == "off":
        return None
    several = processes.MEMBER in os.environ
    # The name has the parent's process id, so each start of the gateway begins with an empty table.
    table = settings.state_path / "run" / f"shared-memory-{os.getppid()}.json" if several else None
    return SharedRegions(limits.bodies, settings.max_body_bytes, table)

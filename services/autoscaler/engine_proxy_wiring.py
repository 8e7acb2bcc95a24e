"""Composition root of ``engine-proxy``, the proxy in front of the container engine."""

from __future__ import annotations

import json
from functools import partial

import uvicorn

from services.autoscaler.api.engine_proxy import EngineProxy
from services.autoscaler.domain.engine_rules import StackBounds
from services.autoscaler.settings import AutoscalerSettings
from tidegate.kernel import telemetry
from tidegate.kernel.http.connections import Connections
from tidegate.kernel.http.protocol import Protocol
from tidegate.kernel.http.timeouts import HttpLimits
from tidegate.kernel.protocol.access import engine_token

log = telemetry.logger(__name__)


def bounds_of(settings: AutoscalerSettings) -> StackBounds:
    """Return the limits for the containers that a launcher with these settings may create."""
    return StackBounds(
        stack=settings.docker_stack,
        images=(settings.docker_image, *settings.docker_images),
        network=settings.docker_network,
        volumes=frozenset(settings.docker_volumes),
        log_drivers=frozenset({"json-file", settings.docker_log_driver}),
    )


def token_of(settings: AutoscalerSettings) -> str | None:
    """Return the token that callers must send; None if callers need no token.

    The token is derived from the service token. Without a service token, return None if ``engine_proxy_open``
    is set; otherwise raise SystemExit.
    """
    if settings.service_token:
        return engine_token(settings.service_token)
    if settings.engine_proxy_open:
        return None
    raise SystemExit(
        "tidegate engine-proxy: no service token. Set TIDEGATE_SERVICE_TOKEN or TIDEGATE_STATE_DIR as for "
        "the autoscaler, or TIDEGATE_ENGINE_PROXY_OPEN=true on a network that only the autoscaler uses."
    )


def run(settings: AutoscalerSettings) -> None:
    """Serve until a signal ends the process."""
    bounds = bounds_of(settings)
    shown = {"stack": bounds.stack, "images": list(bounds.images), "network": bounds.network}
    log.info("starting the proxy in front of the container engine", extra={"bounds": json.dumps(shown)})
    proxy = EngineProxy(bounds, settings.engine_socket, token_of(settings))
    connections = Connections(HttpLimits.of(settings))
    connections.fit_files()
    protocol = partial(Protocol, connections=connections)
    uvicorn.run(
        proxy, http=protocol, ws="none",  # type: ignore[arg-type]
        host=settings.host, port=settings.engine_proxy_port, log_config=None, access_log=False,
        server_header=False, lifespan="off", timeout_graceful_shutdown=5,
    )  # fmt: skip

"""Metrics of the registry."""

from __future__ import annotations

import time

from prometheus_client import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.registry.adapters.sql.reading import Totals

REQUESTS = Counter("tidegate_registry_requests_total", "HTTP requests.", ["method", "route", "status"])
SECONDS = Histogram("tidegate_registry_request_seconds", "Time of HTTP requests.", ["method", "route"])
REVISION = Gauge("tidegate_registry_revision", "Revision of the desired state, which grows with each change.")
UPLOADED = Counter("tidegate_registry_uploaded_bytes_total", "Bytes of artifacts that were uploaded.")
STORED = {
    "versions": Gauge("tidegate_registry_versions", "Model versions."),
    "deployments": Gauge("tidegate_registry_deployments", "Deployments."),
    "endpoints": Gauge("tidegate_registry_endpoints", "Endpoints."),
    "artifacts": Gauge("tidegate_registry_artifacts", "Stored artifacts."),
    "artifact_bytes": Gauge("tidegate_registry_artifact_bytes", "Bytes of stored artifacts."),
}


def show(revision: int, totals: Totals) -> None:
    """Set the gauges: the revision, and how many objects are stored."""
    REVISION.set(revision)
    for name, value in totals._asdict().items():
        STORED[name].set(value)


class RequestMetrics:
    """ASGI middleware that counts and times requests by route.

    One time series per URL path would be too many.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            REQUESTS.labels(scope["method"], route, status).inc()
            SECONDS.labels(scope["method"], route).observe(time.perf_counter() - started)

"""The route of Prometheus's HTTP service discovery. Callers need the metrics token."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from services.autoscaler.application.control_loop import ControlLoop
from services.autoscaler.domain.prometheus_targets import targets
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.http.heads import LOOPBACK

router = APIRouter(tags=["prometheus"])


@router.get("/prometheus/workers")
async def list_workers(request: Request) -> list[dict[str, Any]]:
    """Return every worker that sends heartbeats, in the format of `http_sd_configs`.

    The answer is 503 while the store does not answer. Then Prometheus keeps the workers that it knows.
    """
    loop: ControlLoop = request.app.state.operations.loop
    snapshot = loop.snapshot
    if snapshot is None or snapshot.reports is None:
        raise Unavailable(
            "Workers are not known: the store does not answer, or this autoscaler is a standby."
        )
    return targets(snapshot.reports.values(), local=request.app.state.host in LOOPBACK)

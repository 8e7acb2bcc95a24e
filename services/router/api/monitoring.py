"""HTTP routes for the live numbers, the history, the error budgets and the diagnosis of endpoints."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request

from services.router.application.endpoint_watch import EndpointWatch
from services.router.domain.alerts.error_budgets import error_budgets
from services.router.domain.diagnosis.case import Spans
from services.router.domain.watch import shown
from tidegate.kernel.errors import NotFound, Unavailable

router = APIRouter(prefix="/v1", tags=["monitoring"])


@router.get("/top")
async def top(request: Request) -> dict[str, Any]:
    """Return the numbers of the last 30 s for every endpoint."""
    watch = leading(request)
    now = watch.last.at
    drift: dict[str, str] = request.app.state.judgements.drift_states()
    firing: dict[str, list[str]] = {}
    for alert in request.app.state.alerts.alerts.values():
        if alert.state == "firing":
            firing.setdefault(alert.endpoint, []).append(alert.rule)
    items = [
        shown.live(endpoint, watch.history.of(endpoint.name), watch.statuses_of(endpoint), now)
        | {"drift": drift.get(endpoint.name), "alerts": sorted(set(firing.get(endpoint.name, ())))}
        for endpoint in watch.endpoints()
    ]
    return {"at": now, "items": items}


@router.get("/history/{name}")
async def history(
    request: Request,
    name: str,
    level: Literal["minute", "hour"] = "minute",
    last_s: Annotated[float, Query(gt=0, le=35 * 86_400)] = 3600.0,
) -> dict[str, Any]:
    """Return an endpoint's history by minute or by hour.

    If ``level`` is ``minute``, the last half hour has one point for each reading of the traffic. Earlier
    times have one point for each minute.
    """
    watch = leading(request)
    if watch.endpoint(name) is None:
        raise NotFound(f"There is no endpoint {name!r}. `tidegate routes` lists the endpoints.")
    found, now = watch.history.of(name), time.time()
    windows = (
        found.hours(now - last_s)
        if level == "hour"
        else await asyncio.to_thread(found.pieces, now - last_s, now + 60.0)
    )
    return {"endpoint": name, "level": level, "items": [shown.point(each) for each in windows]}


@router.get("/slo")
async def slo(request: Request) -> dict[str, Any]:
    """Return the error budgets of all endpoints that have objectives, with the burn rates."""
    watch = leading(request)
    items = [
        budget
        for each in watch.endpoints()
        if each.slo is not None
        for budget in error_budgets(each.name, each.slo, watch.history.of(each.name), watch.last.at)
    ]
    return {"items": items}


@router.get("/diagnosis")
async def diagnosis(
    request: Request,
    name: str | None = None,
    window_s: Annotated[float, Query(ge=10, le=86_400)] = 900.0,
    past_s: Annotated[float, Query(ge=30, le=2 * 86_400)] = 86_400.0,
    recent_days: Annotated[int, Query(ge=1, le=14)] = 7,
) -> dict[str, Any]:
    """Return the symptoms of the endpoint ``name``, or of every endpoint if ``name`` is None.

    Each symptom has its evidence and a remedy. The diagnosis compares the last ``window_s`` seconds with
    earlier periods of that length, up to ``past_s`` seconds back. It also compares the last ``recent_days``
    full days with the days before them.
    """
    watch = leading(request)
    endpoints = watch.endpoints()
    if name is not None:
        endpoints = [each for each in endpoints if each.name == name]
        if not endpoints:
            raise NotFound(f"There is no endpoint {name!r}. `tidegate routes` lists the endpoints.")
    spans = Spans(window_s, past_s, watch.day_s, recent_days)
    found: dict[str, Any] = await request.app.state.diagnosis.of(endpoints, spans)
    return found


def leading(request: Request) -> EndpointWatch:
    """Return the watch. Raise Unavailable if this router does not lead or has not read the traffic."""
    watch: EndpointWatch = request.app.state.watch
    if not watch.reads:
        raise Unavailable(
            "this router has not read the traffic yet, or another router leads: retry in a few seconds",
            retry_after_s=5.0,
        )
    return watch

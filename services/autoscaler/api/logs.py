"""Routes for logs: of Deployments and replicas, and of single requests."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from services.autoscaler.application.log_reader import LogReader
from tidegate.kernel.protocol.access import OPERATE
from tidegate.kernel.service import caller
from tidegate.kernel.service.api import JsonRoute

router = APIRouter(prefix="/v1", tags=["autoscaler"], route_class=JsonRoute)


def _logs(request: Request) -> LogReader:
    found: LogReader = request.app.state.logs
    return found


LogReaderDep = Annotated[LogReader, Depends(_logs)]
Lines = Annotated[int, Query(ge=0, le=10_000)]


@router.get("/logs/{name}")
async def read_logs(
    name: str, logs: LogReaderDep, since: float = -1.0, until: float = 1e11, lines: Lines = 100
) -> dict[str, list[dict[str, Any]]]:
    """Return the last log lines of a Deployment, Endpoint or replica, in order of time.

    For operators, `name` may also be a service. Lines of ended replicas are included.

    `since` and `until` are in seconds since the epoch. Lines of the model's own output have `model` as their
    `source`.
    """
    services = caller.current.get().principal.may(OPERATE)
    items = await logs.read(name, since=since, until=until, lines=lines, services=services)
    return {"items": items}


@router.get("/requests/{id}/logs")
async def read_request(id: str, logs: LogReaderDep) -> dict[str, list[dict[str, Any]]]:
    """Return the log lines on this machine that are about a request or job, in order of time."""
    return {"items": await logs.of_request(id)}

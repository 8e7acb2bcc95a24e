"""HTTP door of the autoscaler for logs: of Deployments and replicas, and of single requests."""

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


Core = Annotated[LogReader, Depends(_logs)]
Lines = Annotated[int, Query(ge=0, le=10_000)]


@router.get("/logs/{name}")
async def read_logs(
    name: str, core: Core, since: float = -1.0, until: float = 1e11, lines: Lines = 100
) -> dict[str, list[dict[str, Any]]]:
    """Return the last lines of a Deployment, Endpoint or replica, by time, ended replicas included.

    `since` and `until` are in seconds since the epoch. Lines of the model's own output have the `source`
    `model`. Operators may name a service, too.
    """
    services = caller.current.get().principal.may(OPERATE)
    items = await core.read(name, since=since, until=until, lines=lines, services=services)
    return {"items": items}


@router.get("/requests/{id}/logs")
async def read_request(id: str, core: Core) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of this machine's services about a request or job, by time."""
    return {"items": await core.of_request(id)}

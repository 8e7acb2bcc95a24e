"""What was: the audit log of changes, and usage."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel

from services.registry.adapters.sql import audit, usage
from services.registry.api.bodies import Items, registrar
from services.registry.application.registrar import Registrar
from services.registry.domain.usage import BY, UsageQuery, as_csv
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.access import ADMIN
from tidegate.kernel.service.caller import needs

router = APIRouter(prefix="/v1", tags=["history"], dependencies=[Depends(needs(ADMIN))])

Core = Annotated[Registrar, Depends(registrar)]


class AuditEntry(BaseModel):
    """One change: who, what, when, from where, before and after."""

    id: int
    at: datetime
    principal: str
    principal_name: str
    origin: str
    request_id: str
    action: str
    kind: str
    name: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    revision: int


class AuditPage(BaseModel):
    """Entries, newest first. ``next``: give it as ``before`` for older ones; None: there are none."""

    items: list[AuditEntry]
    next: int | None


@router.get("/audit")
async def read_audit(
    core: Core,
    principal: Annotated[str | None, Query(description="Only changes by this one (its id).")] = None,
    kind: Annotated[str | None, Query(description="version, deployment, endpoint or key.")] = None,
    name: str | None = None,
    before: Annotated[int | None, Query(description="Only entries of smaller ids.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> AuditPage:
    """Return changes to the intention, newest first."""
    async with core.database.read() as reader:
        found = await audit.entries(
            reader.connection, principal=principal, kind=kind, name=name, before=before, limit=limit
        )
    items = [AuditEntry.model_validate(row) for row in found]
    return AuditPage(items=items, next=items[-1].id if len(items) == limit else None)


def _wanted(
    since: Annotated[date | None, Query(description="First day (UTC).")] = None,
    until: Annotated[date | None, Query(description="Last day (UTC), inclusive.")] = None,
    principal: Annotated[str | None, Query(description="Only of this one (its id).")] = None,
    endpoint: str | None = None,
    by: Annotated[str, Query(description="Columns to sum by, of day, principal, endpoint.")] = ",".join(BY),
) -> UsageQuery:
    named = tuple(dict.fromkeys(word.strip() for word in by.split(",") if word.strip()))
    if set(named) - set(BY):
        raise BadRequest(f"by must name some of {', '.join(BY)}, not {by[:80]!r}.")
    return UsageQuery(since, until, principal, endpoint, named)


Which = Annotated[UsageQuery, Depends(_wanted)]


@router.get("/usage")
async def read_usage(core: Core, wanted: Which) -> Items[dict[str, Any]]:
    """Return usage, summed: the model's time in microseconds, sizes of bodies in bytes."""
    async with core.database.read() as reader:
        return Items(items=await usage.sums(reader.connection, wanted))


@router.get("/usage.csv", response_class=Response)
async def export_usage(core: Core, wanted: Which) -> Response:
    """Return usage as CSV."""
    async with core.database.read() as reader:
        rows = await usage.sums(reader.connection, wanted)
    headers = {"Content-Disposition": 'attachment; filename="tidegate-usage.csv"'}
    return Response(as_csv(rows, wanted.by), media_type="text/csv; charset=utf-8", headers=headers)


@router.get("/usage/{principal}/quota", include_in_schema=False)
async def read_used(core: Core, principal: str, day: date) -> dict[str, int]:
    """Return, for gateways, the requests of a principal on a day, and in the month up to and with it."""
    async with core.database.read() as reader:
        return {
            "day": await usage.requests(reader.connection, principal, day, day),
            "month": await usage.requests(reader.connection, principal, day.replace(day=1), day),
        }

"""Routes of the audit log and of usage."""

from __future__ import annotations

from datetime import date, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel

from services.registry.adapters.sql import audit, usage
from services.registry.api.bodies import Items
from services.registry.api.dependencies import TransactionsDep
from services.registry.domain.usage import BY, UsageQuery, as_csv
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.access import ADMIN
from tidegate.kernel.service.caller import needs

router = APIRouter(prefix="/v1", tags=["history"], dependencies=[Depends(needs(ADMIN))])


class AuditEntry(BaseModel):
    """A change: its principal, time and origin, and the changed object before and after the change."""

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
    """Entries, newest first, or oldest first if the request has ``after``.

    ``next``: the parameter ``before`` (or ``after``) for the next page; None on the last page.
    """

    items: list[AuditEntry]
    next: int | None


@router.get("/audit")
async def read_audit(
    transactions: TransactionsDep,
    principal: Annotated[str | None, Query(description="Only changes by the principal with this id.")] = None,
    kind: Annotated[
        str | None,
        Query(description="Only this kind: version, alias, policy, deployment, endpoint, artifact or key."),
    ] = None,
    name: str | None = None,
    before: Annotated[int | None, Query(description="Only entries with a smaller id.")] = None,
    after: Annotated[int | None, Query(description="Only entries with a larger id, oldest first.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> AuditPage:
    """Return changes of the desired state and of keys, newest first. With ``after``, oldest first."""
    async with transactions.read() as reader:
        rows = await audit.entries(
            reader.connection,
            principal=principal,
            kind=kind,
            name=name,
            before=before,
            after=after,
            limit=limit,
        )
    items = [AuditEntry.model_validate(row) for row in rows]
    return AuditPage(items=items, next=items[-1].id if len(items) == limit else None)


def _usage_query(
    since: Annotated[date | None, Query(description="First day (UTC).")] = None,
    until: Annotated[date | None, Query(description="Last day (UTC), inclusive.")] = None,
    principal: Annotated[str | None, Query(description="Only usage of the principal with this id.")] = None,
    endpoint: str | None = None,
    by: Annotated[str, Query(description=("Columns to sum by: some of day,principal,endpoint."))] = ",".join(
        BY
    ),
) -> UsageQuery:
    columns = tuple(dict.fromkeys(word.strip() for word in by.split(",") if word.strip()))
    if set(columns) - set(BY):
        raise BadRequest(
            f"`by` must name one or more of {', '.join(BY)}, separated by commas, not {by[:80]!r}."
        )
    return UsageQuery(since, until, principal, endpoint, columns)


UsageQueryDep = Annotated[UsageQuery, Depends(_usage_query)]


@router.get("/usage")
async def read_usage(transactions: TransactionsDep, query: UsageQueryDep) -> Items[dict[str, Any]]:
    """Return sums of usage. Model times are in microseconds, and the sizes of bodies are in bytes."""
    async with transactions.read() as reader:
        return Items(items=await usage.sums(reader.connection, query))


@router.get("/usage.csv", response_class=Response)
async def export_usage(transactions: TransactionsDep, query: UsageQueryDep) -> Response:
    """Return usage as CSV."""
    async with transactions.read() as reader:
        rows = await usage.sums(reader.connection, query)
    headers = {"Content-Disposition": 'attachment; filename="tidegate-usage.csv"'}
    return Response(as_csv(rows, query.by), media_type="text/csv; charset=utf-8", headers=headers)


# The id of a caller with a JWT can contain a slash. Then it must be a parameter, not a part of the path.
@router.get("/usage/quota", include_in_schema=False)
@router.get("/usage/{principal}/quota", include_in_schema=False)
async def read_quota_usage(transactions: TransactionsDep, principal: str, day: date) -> dict[str, int]:
    """Return a principal's number of requests on ``day``, and from the start of its month to ``day``.

    Gateways need these numbers to check quotas.
    """
    async with transactions.read() as reader:
        return {
            "day": await usage.requests(reader.connection, principal, day, day),
            "month": await usage.requests(reader.connection, principal, day.replace(day=1), day),
        }

"""Usage in SQL: sums by day. Each report is added only once."""

from __future__ import annotations

from datetime import date, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import api_keys, usage_daily, usage_reports
from services.registry.domain.usage import UsageQuery
from tidegate.kernel.protocol.usage import COUNTS, UsageReport


async def add(connection: AsyncConnection, report: UsageReport, now: datetime) -> bool:
    """Add a report to the sums. Return False if it was added before."""
    same = (usage_reports.c.incarnation == report.incarnation) & (usage_reports.c.seq == report.seq)
    if (await connection.execute(sa.select(usage_reports.c.seq).where(same))).first() is not None:
        return False
    seen = {"incarnation": report.incarnation, "seq": report.seq, "taken_at": now}
    await connection.execute(sa.insert(usage_reports).values(seen))
    for subject, counts in report.counts.items():
        values = dict(zip(COUNTS, counts, strict=True))
        where = (
            (usage_daily.c.day == subject.day)
            & (usage_daily.c.principal == subject.principal)
            & (usage_daily.c.endpoint == subject.endpoint)
        )
        more = {name: usage_daily.c[name] + count for name, count in values.items()}
        if not (await connection.execute(sa.update(usage_daily).where(where).values(more))).rowcount:
            await connection.execute(sa.insert(usage_daily).values(**subject._asdict(), **values))
    return True


async def forget_reports(connection: AsyncConnection, before: datetime) -> None:
    """Delete the ids of the reports that were added before this time.

    Gateways never resend such old reports, so the ids are not needed any more.
    """
    await connection.execute(sa.delete(usage_reports).where(usage_reports.c.taken_at < before))


async def sums(connection: AsyncConnection, usage_query: UsageQuery) -> list[dict[str, Any]]:
    """Return the sums of usage, grouped and sorted by the columns ``usage_query.by``.

    Rows with a principal also have the name of its key.
    """
    by = [usage_daily.c[name] for name in usage_query.by]
    counts = [sa.func.sum(usage_daily.c[name]).label(name) for name in COUNTS]
    query = sa.select(*by, *counts).group_by(*by)
    for name in ("principal", "endpoint"):
        if getattr(usage_query, name) is not None:
            query = query.where(usage_daily.c[name] == getattr(usage_query, name))
    if usage_query.since is not None:
        query = query.where(usage_daily.c.day >= usage_query.since)
    if usage_query.until is not None:
        query = query.where(usage_daily.c.day <= usage_query.until)
    rows = [dict(row) for row in (await connection.execute(query)).mappings()]
    # Sort here and not in SQL, so that the order is the same with every database.
    rows.sort(key=lambda row: [str(row[name]) for name in usage_query.by])
    # If there is no usage and no column to group by, SQL returns one row of nulls. Leave it out.
    result: list[dict[str, Any]] = [
        {name: int(v) if name in COUNTS else v for name, v in row.items()}
        for row in rows
        if row["requests"] is not None
    ]
    if "principal" in usage_query.by:
        names = await _names(connection)
        for row in result:
            row["principal_name"] = names.get(row["principal"], row["principal"])
    return result


async def requests(connection: AsyncConnection, principal: str, since: date, until: date) -> int:
    """Return a principal's number of requests on the days ``since`` to ``until``, both included."""
    query = sa.select(sa.func.coalesce(sa.func.sum(usage_daily.c.requests), 0)).where(
        usage_daily.c.principal == principal, usage_daily.c.day >= since, usage_daily.c.day <= until
    )
    return int((await connection.execute(query)).scalar_one())


async def _names(connection: AsyncConnection) -> dict[str, str]:
    rows = await connection.execute(sa.select(api_keys.c.id, api_keys.c.name))
    return {row.id: row.name for row in rows}

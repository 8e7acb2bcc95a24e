"""The audit log in SQL. Rows are added and read, but never changed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import audit
from services.registry.domain.audit import NewAuditEntry
from services.registry.domain.rollback import EndpointHistory, deployments_of

# A rollback considers at most this many of the latest changes of an Endpoint.
MAX_HISTORY = 200


async def add(connection: AsyncConnection, entry: NewAuditEntry) -> None:
    """Add an entry to the audit log, in the same transaction as the change that it describes."""
    await connection.execute(sa.insert(audit).values(asdict(entry)))


async def entries(
    connection: AsyncConnection,
    *,
    principal: str | None = None,
    kind: str | None = None,
    name: str | None = None,
    before: int | None = None,
    after: int | None = None,
    limit: int = 100,
) -> list[dict[str, Any]]:
    """Return entries with their ids, newest first; with ``after``, oldest first.

    ``before``: return only entries whose id is smaller than this. ``after``: return only entries whose id is
    larger than this.
    """
    order = audit.c.id.desc() if after is None else audit.c.id
    query = sa.select(audit).order_by(order).limit(limit)
    if after is not None:
        query = query.where(audit.c.id > after)
    for column, value in ((audit.c.principal, principal), (audit.c.kind, kind), (audit.c.name, name)):
        if value is not None:
            query = query.where(column == value)
    if before is not None:
        query = query.where(audit.c.id < before)
    return [dict(row) for row in (await connection.execute(query)).mappings()]


async def history_of(connection: AsyncConnection, endpoint: str, present: Collection[str]) -> EndpointHistory:
    """Return past states of an Endpoint, and the last state of each of its deleted Deployments.

    ``present``: the names of all existing Deployments.
    """
    changes = await entries(connection, kind="endpoint", name=endpoint, limit=MAX_HISTORY)
    states = [entry["after"] for entry in changes if entry["after"] is not None]
    deleted: dict[str, Any] = {}
    for name in deployments_of(states):
        if name not in present:
            last = await entries(connection, kind="deployment", name=name, limit=1)
            if last and last[0]["before"] is not None:
                deleted[name] = last[0]["before"]
    return EndpointHistory(states, deleted)

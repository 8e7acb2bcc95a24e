"""Read and write the aliases of versions in SQL. Their history is in the audit log."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import aliases


async def of_models(
    connection: AsyncConnection, models: Collection[str] | None = None
) -> dict[str, dict[str, int]]:
    """Return the aliases of these models, with the version of each alias.

    ``models`` None: return the aliases of all models.
    """
    query = sa.select(aliases.c.model, aliases.c.alias, aliases.c.number)
    if models is not None:
        query = query.where(aliases.c.model.in_(models))
    found: dict[str, dict[str, int]] = {}
    for model, alias, number in await connection.execute(query):
        found.setdefault(model, {})[alias] = number
    return {model: dict(sorted(found[model].items())) for model in sorted(found)}


async def put(connection: AsyncConnection, model: str, alias: str, number: int, now: datetime) -> None:
    """Point an alias to a version."""
    await drop(connection, model, alias)
    values = {"model": model, "alias": alias, "number": number, "moved_at": now}
    await connection.execute(sa.insert(aliases).values(values))


async def drop(connection: AsyncConnection, model: str, alias: str) -> None:
    """Delete an alias."""
    mine = (aliases.c.model == model) & (aliases.c.alias == alias)
    await connection.execute(sa.delete(aliases).where(mine))

"""Read from SQL which versions are deleted, but not removed permanently yet."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import versions

# The largest number of versions that one transaction removes permanently.
BATCH = 500


async def states(
    connection: AsyncConnection, models: Collection[str]
) -> dict[tuple[str, int], tuple[datetime | None, str | None]]:
    """Return the deletion time and the stage of each version of these models.

    A version that is not deleted has the deletion time None. A version without a stage has the stage None.
    Versions with neither a deletion time nor a stage are left out.
    """
    query = sa.select(versions.c.model, versions.c.number, versions.c.deleted_at, versions.c.stage)
    special = versions.c.deleted_at.is_not(None) | versions.c.stage.is_not(None)
    rows = await connection.execute(query.where(versions.c.model.in_(models), special))
    return {(model, number): (at, stage) for model, number, at, stage in rows}


async def expired(connection: AsyncConnection, before: datetime) -> list[tuple[str, int]]:
    """Return at most ``BATCH`` versions that were deleted before this time."""
    query = sa.select(versions.c.model, versions.c.number).where(versions.c.deleted_at <= before)
    return [(model, number) for model, number in await connection.execute(query.limit(BATCH))]


async def registered(connection: AsyncConnection, model: str) -> dict[int, datetime]:
    """Return the registration time of each version of a model. Deleted versions are left out."""
    query = sa.select(versions.c.number, versions.c.created_at)
    rows = await connection.execute(query.where(versions.c.model == model, versions.c.deleted_at.is_(None)))
    return {row.number: row.created_at for row in rows}

"""Write the searchable facts of versions in SQL: a row per metric, parameter, tag or other field."""

from __future__ import annotations

from dataclasses import asdict

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import version_facts
from services.registry.domain.version_metadata import facts_of
from tidegate.kernel.protocol.models import VersionMetadata


async def write(connection: AsyncConnection, model: str, number: int, metadata: VersionMetadata) -> None:
    """Replace the facts of a version."""
    await drop(connection, model, number)
    rows = [{"model": model, "number": number, **asdict(fact)} for fact in facts_of(metadata)]
    if rows:
        await connection.execute(sa.insert(version_facts), rows)


async def drop(connection: AsyncConnection, model: str, number: int) -> None:
    """Delete the facts of a version."""
    mine = (version_facts.c.model == model) & (version_facts.c.number == number)
    await connection.execute(sa.delete(version_facts).where(mine))

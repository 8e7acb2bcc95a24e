"""The running replicas in SQL, so that all registries know which artifact a replica may read."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import running_replicas


async def all_of(connection: AsyncConnection) -> dict[str, str]:
    """Return the sha256 of the artifact of each running replica."""
    rows = await connection.execute(sa.select(running_replicas))
    return {row.replica: row.sha256 for row in rows}


async def artifact_of(connection: AsyncConnection, replica: str) -> str | None:
    """Return the sha256 of the artifact that a replica may read; None if it does not run."""
    query = sa.select(running_replicas.c.sha256).where(running_replicas.c.replica == replica)
    found: str | None = (await connection.execute(query)).scalar_one_or_none()
    return found


async def replace(connection: AsyncConnection, before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Change the stored running replicas from ``before`` to ``after``. Write only the differences.

    ``before`` and ``after`` map each replica to the sha256 of its artifact.
    """
    gone = [{"gone": name} for name in before if before[name] != after.get(name)]
    new = [{"replica": name, "sha256": after[name]} for name in after if after[name] != before.get(name)]
    if gone:
        where = running_replicas.c.replica == sa.bindparam("gone")
        await connection.execute(sa.delete(running_replicas).where(where), gone)
    if new:
        await connection.execute(sa.insert(running_replicas), new)

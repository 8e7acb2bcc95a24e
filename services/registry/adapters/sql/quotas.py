"""Read from SQL how many versions and artifact bytes a principal has, for the check of its quota."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import artifacts, versions
from services.registry.domain.quotas import Used


async def used(connection: AsyncConnection, principal: str) -> Used:
    """Return the number of a principal's versions, and the total size of their artifacts in bytes.

    An artifact of several versions counts only once. Deleted versions do not count.
    """
    mine = (versions.c.created_by == principal) & versions.c.deleted_at.is_(None)
    count = sa.select(sa.func.count()).select_from(versions).where(mine).scalar_subquery()
    digests = sa.select(versions.c.artifact_sha256).where(mine)
    size = sa.select(sa.func.coalesce(sa.func.sum(artifacts.c.size), 0))
    total = size.where(artifacts.c.sha256.in_(digests)).scalar_subquery()
    row = (await connection.execute(sa.select(count, total))).one()
    return Used(int(row[0]), int(row[1]))


async def has_artifact(connection: AsyncConnection, principal: str, sha256: str) -> bool:
    """Return True if a version of this principal has the artifact. Deleted versions do not count."""
    mine = (versions.c.created_by == principal) & versions.c.deleted_at.is_(None)
    query = sa.select(sa.exists().where(mine, versions.c.artifact_sha256 == sha256))
    return bool((await connection.execute(query)).scalar_one())

"""Read and write the tasks of scratch replicas in SQL: a Deployment and samples for each version."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import verification_tasks


async def find(connection: AsyncConnection, model: str, number: int) -> dict[str, Any] | None:
    """Return the task of a version's scratch replica; None if it has no task."""
    query = sa.select(verification_tasks.c.document).where(_is(model, number))
    found: dict[str, Any] | None = (await connection.execute(query)).scalar_one_or_none()
    return found


async def put(connection: AsyncConnection, model: str, number: int, document: dict[str, Any]) -> None:
    """Write the task of a version's scratch replica."""
    await drop(connection, model, number)
    values = {"model": model, "number": number, "document": document}
    await connection.execute(sa.insert(verification_tasks).values(values))


async def drop(connection: AsyncConnection, model: str, number: int) -> None:
    """Delete the task of a version's scratch replica, if it exists."""
    await connection.execute(sa.delete(verification_tasks).where(_is(model, number)))


def _is(model: str, number: int) -> sa.ColumnElement[bool]:
    return (verification_tasks.c.model == model) & (verification_tasks.c.number == number)

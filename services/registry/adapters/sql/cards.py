"""Read and write model cards in SQL."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import model_cards


async def find(connection: AsyncConnection, model: str, number: int) -> str | None:
    """Return a version's card; None if it has none."""
    query = sa.select(model_cards.c.text).where(_is(model, number))
    found: str | None = (await connection.execute(query)).scalar_one_or_none()
    return found


async def put(connection: AsyncConnection, model: str, number: int, text: str, now: datetime) -> None:
    """Write a version's card. It replaces an earlier card."""
    await drop(connection, model, number)
    values = {"model": model, "number": number, "text": text, "created_at": now}
    await connection.execute(sa.insert(model_cards).values(values))


async def drop(connection: AsyncConnection, model: str, number: int) -> bool:
    """Delete a version's card. Return False if it has none."""
    return bool((await connection.execute(sa.delete(model_cards).where(_is(model, number)))).rowcount)


def _is(model: str, number: int) -> sa.ColumnElement[bool]:
    return (model_cards.c.model == model) & (model_cards.c.number == number)

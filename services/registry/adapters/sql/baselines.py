"""Read and write training baselines in SQL: the profiles of versions' training data."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import baselines


async def find(connection: AsyncConnection, model: str, number: int) -> dict[str, Any] | None:
    """Return the document of a version's baseline; None if it has none."""
    query = sa.select(baselines.c.document).where(_is(model, number))
    found: dict[str, Any] | None = (await connection.execute(query)).scalar_one_or_none()
    return found


async def put(
    connection: AsyncConnection, model: str, number: int, document: dict[str, Any], now: datetime
) -> str:
    """Write a version's baseline, and return its sha256."""
    digest = hashlib.sha256(orjson.dumps(document, option=orjson.OPT_SORT_KEYS)).hexdigest()
    await drop(connection, model, number)
    values = {"model": model, "number": number, "document": document, "sha256": digest, "created_at": now}
    await connection.execute(sa.insert(baselines).values(values))
    return digest


async def drop(connection: AsyncConnection, model: str, number: int) -> bool:
    """Delete a version's baseline. Return False if it has none."""
    return bool((await connection.execute(sa.delete(baselines).where(_is(model, number)))).rowcount)


def _is(model: str, number: int) -> sa.ColumnElement[bool]:
    return (baselines.c.model == model) & (baselines.c.number == number)

"""Read and write the cryptographic signatures of artifacts in SQL."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import signatures


class StoredSignature(NamedTuple):
    """The signature of an artifact.

    ``key``: the public key's sha256. ``created_at``: the time at which the signature was stored.
    """

    key: str
    bundle: dict[str, Any]
    created_at: datetime


async def find(connection: AsyncConnection, sha256: str) -> list[StoredSignature]:
    """Return the signatures of an artifact, oldest first."""
    columns = signatures.c.key, signatures.c.bundle, signatures.c.created_at
    query = sa.select(*columns).where(signatures.c.sha256 == sha256).order_by(signatures.c.created_at)
    return [StoredSignature(*row) for row in await connection.execute(query)]


async def put(connection: AsyncConnection, sha256: str, stored: StoredSignature) -> None:
    """Write a signature. It replaces an earlier signature that was made with the same key."""
    await drop(connection, sha256, stored.key)
    await connection.execute(sa.insert(signatures).values(sha256=sha256, **stored._asdict()))


async def drop(connection: AsyncConnection, sha256: str, key: str) -> bool:
    """Delete an artifact's signature by this key. Return False if there is no such signature."""
    query = sa.delete(signatures).where(signatures.c.sha256 == sha256, signatures.c.key == key)
    return bool((await connection.execute(query)).rowcount)

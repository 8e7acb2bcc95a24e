"""Read and write in SQL the uploads that are in progress.

Uploads are not desired state, so they have no revision and no audit entries.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import uploads
from services.registry.domain.uploads import Upload


async def find(connection: AsyncConnection, id_: str) -> Upload | None:
    """Return an upload; None if it does not exist."""
    found = await _read(connection, uploads.c.id == id_)
    return found[0] if found else None


async def of_owner(connection: AsyncConnection, owner: str) -> list[Upload]:
    """Return the uploads of a caller, oldest first."""
    return await _read(connection, uploads.c.owner == owner)


async def ids(connection: AsyncConnection) -> set[str]:
    """Return the ids of all uploads."""
    return set((await connection.execute(sa.select(uploads.c.id))).scalars())


async def add(connection: AsyncConnection, upload: Upload, now: datetime) -> None:
    """Add an upload."""
    await connection.execute(sa.insert(uploads).values(id=upload.id, created_at=now, **_fields(upload)))


async def change(connection: AsyncConnection, upload: Upload, before: int) -> bool:
    """Update the row of an unfinished upload. Return False if nothing is updated.

    ``before``: the number of bytes that were stored before this update. If the row has another number, or if
    the upload has ended, nothing is updated.
    """
    unfinished = sa.not_(uploads.c.stored) & (uploads.c.problem == "")
    query = sa.update(uploads).where(uploads.c.id == upload.id, uploads.c.received == before, unfinished)
    return bool((await connection.execute(query.values(_fields(upload)))).rowcount)


async def drop(connection: AsyncConnection, id_: str) -> None:
    """Delete an upload."""
    await connection.execute(sa.delete(uploads).where(uploads.c.id == id_))


async def drop_older(connection: AsyncConnection, moment: datetime) -> list[str]:
    """Delete the uploads that got no bytes since ``moment``. Return their ids."""
    old = sa.select(uploads.c.id).where(uploads.c.touched_at < moment)
    found = list((await connection.execute(old)).scalars())
    for id_ in found:
        await drop(connection, id_)
    return found


async def _read(connection: AsyncConnection, where: sa.ColumnElement[bool]) -> list[Upload]:
    query = sa.select(uploads).where(where).order_by(uploads.c.created_at, uploads.c.id)
    return [_upload(row) for row in (await connection.execute(query)).mappings()]


def _upload(row: sa.RowMapping) -> Upload:
    return Upload(
        id=row["id"],
        owner=row["owner"],
        sha256=row["sha256"],
        size=row["size"],
        touched_at=row["touched_at"],
        received=row["received"],
        parts=tuple(row["parts"]),
        stored=row["stored"],
        problem=row["problem"],
    )


def _fields(upload: Upload) -> dict[str, Any]:
    return {
        "owner": upload.owner,
        "sha256": upload.sha256,
        "size": upload.size,
        "touched_at": upload.touched_at,
        "received": upload.received,
        "parts": list(upload.parts),
        "stored": upload.stored,
        "problem": upload.problem,
    }

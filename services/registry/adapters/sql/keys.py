"""Read and write API keys in SQL."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from services.registry.adapters.sql.tables import api_keys
from services.registry.domain.keys import KeySpec, StoredKey


async def read(connection: AsyncConnection, id_: str | None = None) -> list[StoredKey]:
    """Return every key, oldest first, including revoked keys. With ``id_``, return only that key."""
    query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
    if id_ is not None:
        query = query.where(api_keys.c.id == id_)
    return [_key(row) for row in (await connection.execute(query)).mappings()]


async def owners(connection: AsyncConnection, ids: Collection[str]) -> dict[str, str]:
    """Return the owner of each of these keys. Keys without an owner are left out.

    Owners of revoked keys are included.
    """
    query = sa.select(api_keys.c.id, api_keys.c.options).where(api_keys.c.id.in_(ids))
    rows = await connection.execute(query)
    return {row.id: row.options["owner"] for row in rows if row.options.get("owner")}


async def not_revoked(connection: AsyncConnection) -> list[StoredKey]:
    """Return the keys that are not revoked."""
    rows = await connection.execute(sa.select(api_keys).where(api_keys.c.revoked_at.is_(None)))
    return [_key(row) for row in rows.mappings()]


async def revision(connection: AsyncConnection) -> int:
    """Return the revision of the latest change to any key; 0 if there are no keys."""
    query = sa.select(sa.func.coalesce(sa.func.max(api_keys.c.revision), 0))
    return int((await connection.execute(query)).scalar_one())


async def put(connection: AsyncConnection, key: StoredKey, revision_: int, *, created: bool) -> None:
    """Insert or update a key. ``revision_``: the new revision of the key."""
    values = {
        "name": key.spec.name,
        "digest": key.digest,
        "previous_digest": key.previous_digest,
        "previous_until": key.previous_until,
        # Leave out defaults, so that an older release can read all keys that do not use newer options.
        "options": key.spec.model_dump(mode="json", exclude={"name", "expires_at"}, exclude_defaults=True),
        "expires_at": key.spec.expires_at,
        "revoked_at": key.revoked_at,
        "revision": revision_,
    }
    if created:
        await connection.execute(sa.insert(api_keys).values(id=key.id, created_at=key.created_at, **values))
    else:
        await connection.execute(sa.update(api_keys).where(api_keys.c.id == key.id).values(values))


def _key(row: sa.RowMapping) -> StoredKey:
    fields: dict[str, Any] = {**row["options"], "name": row["name"], "expires_at": row["expires_at"]}
    return StoredKey(
        id=row["id"],
        spec=KeySpec.model_validate(fields),
        digest=row["digest"],
        created_at=row["created_at"],
        previous_digest=row["previous_digest"],
        previous_until=row["previous_until"],
        revoked_at=row["revoked_at"],
        revision=row["revision"],
    )

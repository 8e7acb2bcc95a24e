"""The ETags of stored objects."""

from __future__ import annotations

import sqlalchemy as sa

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.tables import api_keys, deployments, endpoints
from services.registry.domain.preconditions import Kind, version_etag

_REVISIONS = {
    "deployment": (deployments.c.revision, deployments.c.name),
    "endpoint": (endpoints.c.revision, endpoints.c.name),
    "key": (api_keys.c.revision, api_keys.c.id),
}


async def etag_of(reader: DesiredStateReader, kind: Kind, name: str) -> str | None:
    """Return the ETag of an object, without quotes; None if it does not exist. A version is ``MODEL/N``."""
    if kind == "version":
        model, _, number = name.rpartition("/")
        found = await reader.versions(model, int(number))
        return version_etag(found[0]) if found else None
    revision, identity = _REVISIONS[kind]
    rows = await reader.connection.execute(sa.select(revision).where(identity == name))
    stored = rows.scalar_one_or_none()
    return None if stored is None else str(stored)

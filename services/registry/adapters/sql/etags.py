"""Read the ETags of stored objects."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from services.registry.adapters.sql import aliases, baselines, cards, policies
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.tables import api_keys, deployments, endpoints
from services.registry.domain.model_policy import ModelPolicy
from services.registry.domain.preconditions import Kind, content_etag, version_etag

_REVISIONS = {
    "deployment": (deployments.c.revision, deployments.c.name),
    "endpoint": (endpoints.c.revision, endpoints.c.name),
    "key": (api_keys.c.revision, api_keys.c.id),
}


async def etag_of(reader: DesiredStateReader, kind: Kind, name: str) -> str | None:
    """Return the ETag of an object, without quotes; None if it does not exist.

    ``name`` is ``MODEL/NUMBER`` for a version, a card or a baseline, and ``MODEL/ALIAS`` for an alias.
    """
    model, _, part = name.rpartition("/")
    match kind:
        case "version":
            found = await reader.versions(model, int(part))
            return version_etag(found[0]) if found else None
        case "card":
            return _of(await cards.find(reader.connection, model, int(part)))
        case "baseline":
            return _of(await baselines.find(reader.connection, model, int(part)))
        case "policy":
            policy = (await policies.read(reader.connection)).get(name, ModelPolicy())
            return content_etag(policy.model_dump(mode="json"))
        case "alias":
            number = (await aliases.of_models(reader.connection, [model])).get(model, {}).get(part)
            return None if number is None else str(number)
    revision, identity = _REVISIONS[kind]
    rows = await reader.connection.execute(sa.select(revision).where(identity == name))
    stored = rows.scalar_one_or_none()
    return None if stored is None else str(stored)


def _of(content: Any) -> str | None:
    return None if content is None else content_etag(content)

"""Check the quota of the key that registers a version."""

from __future__ import annotations

from services.registry.adapters.sql import keys, quotas
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.domain.quotas import Quota, check
from tidegate.kernel.service import caller


async def check_quota(reader: DesiredStateReader, artifact: str, size: int) -> None:
    """Raise Forbidden if a new version with this artifact would exceed the quota of the caller's key.

    ``size``: bytes of the artifact. Callers without a key, such as services, have no quota.
    """
    principal = caller.current.get().principal
    stored = next(iter(await keys.read(reader.connection, principal.id)), None)
    if stored is None:
        return
    quota = Quota(stored.spec.name, stored.spec.max_versions, stored.spec.max_artifact_bytes)
    if quota.versions is None and quota.artifact_bytes is None:
        return
    known = await quotas.has_artifact(reader.connection, principal.id, artifact)
    check(quota, await quotas.used(reader.connection, principal.id), 0 if known else size)

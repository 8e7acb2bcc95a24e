"""Find the version for a reference such as ``digits@3`` or ``digits@latest``."""

from __future__ import annotations

from services.registry.adapters.sql import aliases
from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.domain import names
from services.registry.domain.aliases import unknown
from services.registry.domain.references import Reference
from tidegate.kernel.protocol.models import Version


async def version_of(reader: DesiredStateReader, reference: Reference) -> Version:
    """Return the version that a reference names. Raise NotFound if there is no such version."""
    if reference.alias is not None:
        known = (await aliases.of_models(reader.connection, [reference.model])).get(reference.model, {})
        if reference.alias not in known:
            raise unknown(reference.model, reference.alias, known)
        reference = Reference(reference.model, known[reference.alias])
    if reference.number is None:
        latest = (await reader.latest_versions([reference.model])).get(reference.model)
        if latest is None:
            raise names.unknown("model", reference.model)
        return latest
    found = await reader.version(reference.model, reference.number)
    if found is None:
        raise names.unknown_version(reference.model, reference.number)
    return found

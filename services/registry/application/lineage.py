"""Follow the parents of a version, and find the versions that were made from it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from services.registry.adapters.sql.reading import DesiredStateReader
from services.registry.adapters.sql.search import Search, find
from services.registry.application.resolution import version_of
from services.registry.domain.filters import Condition, Subject
from services.registry.domain.references import parse
from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.protocol.models import Version, VersionMetadata

MOST_ANCESTORS = 50
MOST_CHILDREN = 1_000
_PARENT = Subject("field", "parent", "text")


@dataclass(frozen=True, slots=True)
class Relative:
    """A version in a lineage, with the run, data and commit that made it.

    ``known`` False: the version is not registered here.
    """

    version: str
    known: bool
    run: str | None = None
    dataset: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Lineage:
    """The ancestors of a version, nearest first, and the versions that name it as their parent."""

    ancestors: list[Relative]
    children: list[Relative]


async def lineage_of(reader: DesiredStateReader, version: Version) -> Lineage:
    """Return the lineage of a version."""
    ancestors: list[Relative] = []
    seen, parent = {_named(version)}, version.metadata.parent
    while parent is not None and parent not in seen and len(ancestors) < MOST_ANCESTORS:
        seen.add(parent)
        found = await _registered(reader, parent)
        ancestors.append(_relative(found) if found is not None else Relative(parent, known=False))
        parent = found.metadata.parent if found is not None else None
    made_from = Condition(_PARENT, "=", (_named(version),))
    children, _ = await find(reader.connection, Search((made_from,), limit=MOST_CHILDREN))
    return Lineage(ancestors, [_relative(child) for child in children])


async def with_parent(reader: DesiredStateReader, metadata: VersionMetadata, own: str) -> VersionMetadata:
    """Return the metadata of the version ``own``, with its parent as ``MODEL@NUMBER``.

    The publisher may name the parent by an alias or ``latest``. An alias and ``latest`` can point to another
    version later, so the number is stored. If the parent is not registered here, leave its name as it is.
    Raise BadRequest if the version is its own parent.
    """
    parent = metadata.parent
    if parent is None or "@" not in parent:
        return metadata
    found = await _registered(reader, parent)
    if found is not None and _named(found) == own:
        raise BadRequest(
            f"{parent} is this version itself, so it cannot be the parent. Name the version from which this "
            "one was made."
        )
    return metadata if found is None else metadata.model_copy(update={"parent": _named(found)})


async def _registered(reader: DesiredStateReader, reference: str) -> Version | None:
    with contextlib.suppress(BadRequest, NotFound):
        return await version_of(reader, parse(reference))
    return None


def _relative(version: Version) -> Relative:
    about = version.metadata
    return Relative(_named(version), True, about.run, about.dataset, about.commit)


def _named(version: Version) -> str:
    return f"{version.model}@{version.number}"

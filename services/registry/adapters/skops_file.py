"""Read the names of the types in a skops file. Nothing in the file is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from services.registry.adapters import archive_reader
from services.registry.domain import json_outline
from services.registry.domain.json_outline import Malformed
from services.registry.domain.skops_types import SkopsType
from tidegate.kernel import archives
from tidegate.kernel.errors import BadRequest
from tidegate.kernel.protocol.archives import ArchiveLimits

SCHEMA = "schema.json"
MAX_SCHEMA = 64 * 1024 * 1024
MAX_TYPES = 10_000
_KEYS = ("__module__", "__class__", "__loader__")


def is_skops(path: Path) -> bool:
    """Return True if a file is a zip archive with a skops schema."""
    with path.open("rb") as file:
        if file.read(4) != archives.ZIP:
            return False
    try:
        with archives.reading():
            return any(member.name == SCHEMA for member, _ in archives.members(path))
    except archives.BrokenArchive:
        return False


def types(path: Path, limits: ArchiveLimits) -> set[SkopsType]:
    """Return all types in a skops file. Blocking.

    Raise BadRequest if the types cannot be read, or if there are too many.
    """
    contents = archive_reader.read_archive(path, names={SCHEMA}, max_text=MAX_SCHEMA, limits=limits)
    schema = contents.texts.get(PurePosixPath(SCHEMA))
    if schema is None:
        raise BadRequest(
            f"The skops file has no {SCHEMA}. Save the estimator with skops.io.dump(model, path)."
        )
    try:
        found: set[SkopsType] = set()
        for each in _types(schema.encode()):
            found.add(each)
            if len(found) > MAX_TYPES:
                raise Malformed(f"the file has more than {MAX_TYPES} different types")
        return found
    except Malformed as error:
        raise BadRequest(
            f"The {SCHEMA} of the skops file cannot be read ({error}). Save the estimator again."
        ) from None


def _types(schema: bytes) -> Iterator[SkopsType]:
    for values in json_outline.objects(schema, frozenset(_KEYS)):
        if "__class__" in values or "__module__" in values or "__loader__" in values:
            yield SkopsType(*(str(values.get(key, "?")) for key in _KEYS))

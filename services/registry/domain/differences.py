"""List the fields of an object that a change of the desired state affects. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from services.registry.domain.audit import NewAuditEntry


class FieldChange(BaseModel):
    """A field's value before and after a change. None: the field had, or has, no value."""

    field: str
    before: Any
    after: Any


def of_object(entries: Iterable[NewAuditEntry], kind: str, name: str) -> list[FieldChange]:
    """Return the changed fields of an object, from the audit entries of one transaction.

    Nested fields have paths such as ``batching.max_batch``. The policy and the aliases of a model are fields
    of the model. The values of ``env`` stay hidden.
    """
    found: list[FieldChange] = []
    for entry in entries:
        if kind == "model" and entry.kind == "alias":
            model, _, alias = entry.name.rpartition("/")
            if model == name:
                found += _changes(f"aliases.{alias}", _version(entry.before), _version(entry.after))
        elif (entry.kind, entry.name) == ("policy" if kind == "model" else kind, name):
            found += _changes("", entry.before, entry.after)
    return found


def _version(fields: Mapping[str, Any] | None) -> Any:
    return None if fields is None else fields["version"]


def _changes(path: str, before: Any, after: Any) -> list[FieldChange]:
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = [*before, *(name for name in after if name not in before)]
        nested = (
            _changes(f"{path}.{name}" if path else name, before.get(name), after.get(name)) for name in names
        )
        return [change for changes in nested for change in changes]
    return [FieldChange(field=path, before=before, after=after)] if path else []

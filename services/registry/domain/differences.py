"""List the fields that a transaction has changed, by object. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from services.registry.domain.audit import HIDDEN_CHANGED, Fields, NewAuditEntry


class FieldChange(BaseModel):
    """A field's value before and after a change. None: the field had, or has, no value."""

    field: str
    before: Any
    after: Any


def of_objects(entries: Iterable[NewAuditEntry]) -> dict[tuple[str, str], list[FieldChange]]:
    """Return the changed fields of each object in the audit entries of one transaction.

    The keys are the objects' kinds and names. Nested fields have paths such as ``batching.max_batch``. The
    policy and the aliases of a model are fields of the model. A created or deleted object has no changed
    fields. The values of ``env`` stay hidden.
    """
    found: dict[tuple[str, str], tuple[Fields, Fields]] = {}
    for entry in entries:
        key, before, after = _of_model(entry)
        if key in found:
            # An earlier entry of this transaction changed the same object. Each entry of a model has only
            # some of its fields.
            first, last = found[key]
            found[key] = _merged(before, first), _merged(last, after)
        else:
            found[key] = before, after
    return {
        key: [] if before is None or after is None else _changes("", before, after)
        for key, (before, after) in found.items()
    }


def _of_model(entry: NewAuditEntry) -> tuple[tuple[str, str], Fields, Fields]:
    """Return the object of an entry, and its fields. Policies and aliases become fields of their model."""
    if entry.kind == "policy":
        return ("model", entry.name), entry.before, entry.after
    if entry.kind == "alias":
        model, _, alias = entry.name.rpartition("/")
        before, after = (
            {"aliases": {alias: None if fields is None else fields["version"]}}
            for fields in (entry.before, entry.after)
        )
        return ("model", model), before, after
    return (entry.kind, entry.name), entry.before, entry.after


def _merged(weak: Fields, strong: Fields) -> Fields:
    """Merge the fields of ``weak`` and ``strong``. If both have a field, return that of ``strong``.

    Aliases are merged one by one, in the same way. If either argument is None, return ``strong``.
    """
    if weak is None or strong is None:
        return strong
    merged = {**strong, **{name: value for name, value in weak.items() if name not in strong}}
    if "aliases" in weak and "aliases" in strong:
        merged["aliases"] = _merged(weak["aliases"], strong["aliases"])
    if weak.get("env") and strong.get("env"):
        # Each audit entry marks only the values of ``env`` that it has changed itself. So if either entry
        # marks a value, keep the mark.
        merged["env"] = {
            name: HIDDEN_CHANGED if HIDDEN_CHANGED in (value, weak["env"].get(name)) else value
            for name, value in strong["env"].items()
        }
    return merged


def _changes(path: str, before: Any, after: Any) -> list[FieldChange]:
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        names = [*before, *(name for name in after if name not in before)]
        nested = (
            _changes(f"{path}.{name}" if path else name, before.get(name), after.get(name)) for name in names
        )
        return [change for changes in nested for change in changes]
    return [FieldChange(field=path, before=before, after=after)]

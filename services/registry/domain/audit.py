"""Build the entries of the audit log: an object's fields before and after a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

HIDDEN, HIDDEN_CHANGED = "(hidden)", "(hidden, changed)"
# The fields that the audit log leaves out: ``revision`` changes with every write, and ``created_at`` never
# changes.
_LEFT_OUT = ("revision", "created_at")

Fields = dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class NewAuditEntry:
    """One change of an object. ``before`` None: creation. ``after`` None: deletion."""

    at: datetime
    principal: str
    principal_name: str
    origin: str
    request_id: str
    action: str
    kind: str
    name: str
    before: Fields
    after: Fields
    revision: int


def audited(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> tuple[Fields, Fields]:
    """Return an object's fields before and after a change, with the values of ``env`` hidden.

    These values may be secrets. A hidden value is marked if it changed.
    """
    old_env = dict(before.get("env") or {}) if before is not None else {}
    return _audited(before, {}), _audited(after, old_env)


def _audited(fields: Mapping[str, Any] | None, old_env: Mapping[str, str]) -> Fields:
    if fields is None:
        return None
    result = {name: value for name, value in fields.items() if name not in _LEFT_OUT}
    if result.get("env"):
        result["env"] = {
            name: HIDDEN_CHANGED if name in old_env and old_env[name] != value else HIDDEN
            for name, value in result["env"].items()
        }
    return result

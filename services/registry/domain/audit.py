"""What the audit log keeps of an object before and after a change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

HIDDEN, HIDDEN_CHANGED = "(hidden)", "(hidden, changed)"
# Not of the object's own: they change with every write, or never.
_NOISE = ("revision", "created_at")

Shown = dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class NewAuditEntry:
    """Who did what to what, when and from where. ``before`` None: it was not there; likewise ``after``."""

    at: datetime
    principal: str
    principal_name: str
    origin: str
    request_id: str
    action: str
    kind: str
    name: str
    before: Shown
    after: Shown
    revision: int


def pair(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> tuple[Shown, Shown]:
    """Both as the log may show them: the values of a Deployment's environment may be secrets."""
    was = dict(before.get("env") or {}) if before is not None else {}
    return _shown(before, {}), _shown(after, was if before is not None else None)


def _shown(what: Mapping[str, Any] | None, was: Mapping[str, str] | None) -> Shown:
    if what is None:
        return None
    shown = {name: value for name, value in what.items() if name not in _NOISE}
    if shown.get("env"):
        shown["env"] = {
            name: HIDDEN_CHANGED if was and name in was and was[name] != value else HIDDEN
            for name, value in shown["env"].items()
        }
    return shown

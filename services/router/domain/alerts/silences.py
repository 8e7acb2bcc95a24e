"""Silences: alerts that match a silence are not sent until it ends. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from services.router.domain.alerts.states import Alert


@dataclass(frozen=True, slots=True)
class Silence:
    """A silence. Endpoint, rule and severity must all match; ``*`` and ``?`` are wildcards.

    ``by``: the caller that created it. ``why``: the caller's reason.
    """

    id: str
    endpoint: str
    rule: str
    severity: str
    begins: float
    until: float
    why: str
    by: str

    def matches(self, alert: Alert) -> bool:
        """Return True if the silence matches this alert."""
        pairs = ((self.endpoint, alert.endpoint), (self.rule, alert.rule), (self.severity, alert.severity))
        return all(fnmatchcase(value, pattern) for pattern, value in pairs)

    def active(self, now: float) -> bool:
        """Return True if the silence has begun and has not ended."""
        return self.begins <= now < self.until

    def to_json(self) -> dict[str, Any]:
        """Return the silence as a document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Silence:
        """Return the silence from a document."""
        return cls(**{k: v for k, v in document.items() if k in cls.__dataclass_fields__})


def silence_of(alert: Alert, silences: Iterable[Silence], now: float) -> Silence | None:
    """Return the silence that applies to an alert now, or None."""
    return next((each for each in silences if each.active(now) and each.matches(alert)), None)

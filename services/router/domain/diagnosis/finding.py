"""A finding of a diagnosis: the symptom, its cause, the evidence, and a command as the remedy. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

SymptomName = Literal["feels_slow", "adoption_falls", "cost_grows", "inconsistent_times", "errors_under_load"]
TITLES: dict[SymptomName, str] = {
    "feels_slow": "the application feels slow",
    "adoption_falls": "adoption falls",
    "cost_grows": "cost grows faster than usage",
    "inconsistent_times": "response times are inconsistent",
    "errors_under_load": "errors rise under load",
}


@dataclass(frozen=True, slots=True)
class Remedy:
    """A command to paste, and why it helps."""

    command: str
    why: str


@dataclass(frozen=True, slots=True)
class Symptom:
    """A symptom of an endpoint. ``numbers``: the evidence as values by name."""

    endpoint: str
    symptom: SymptomName
    cause: str
    evidence: tuple[str, ...]
    remedy: Remedy
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the symptom as a document."""
        return asdict(self) | {"title": TITLES[self.symptom], "evidence": list(self.evidence)}


@dataclass(frozen=True, slots=True)
class Usual:
    """The usual value of a number in the past.

    ``middle``: the median of the past values. ``high``: at most 1 of 20 past values is greater.
    """

    middle: float
    high: float

    def exceeded(self, value: float, ratio: float, margin: float = 1.15) -> bool:
        """Return True if ``value`` is above both ``ratio`` times ``middle`` and ``margin`` times ``high``."""
        return value > self.middle * ratio and value > self.high * margin


def usual_of(values: Sequence[float | None]) -> Usual | None:
    """Summarize the past values of a number; None if all are unknown."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return None
    return Usual(median(found), found[-1 - len(found) // 20])


def ms(seconds: float) -> str:
    """Return a time as text: ``12.3 ms`` or ``1.5 s``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def span(seconds: float) -> str:
    """Return a duration as text: ``15 min``."""
    if seconds >= 86_400:
        return f"{seconds / 86_400:g} d"
    if seconds >= 3600:
        return f"{seconds / 3600:g} h"
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"

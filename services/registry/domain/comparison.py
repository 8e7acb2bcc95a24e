"""Compare two versions: metadata, metrics, signature, size and requirements. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.registry.domain.compatibility import breaking_changes
from services.registry.domain.version_metadata import TEXTS
from tidegate.kernel.protocol.models import Signature, Version

# The compared fields of a version that are not in its metadata.
_FIELDS = ("format", "artifact_sha256", "artifact_size", "created_at")


@dataclass(frozen=True, slots=True)
class Difference:
    """The values of one field in versions a and b. None: the version does not have the field."""

    name: str
    a: Any
    b: Any
    same: bool


@dataclass(frozen=True, slots=True)
class Delta:
    """A metric or a figure of two versions. ``delta`` is b - a. ``percent`` is ``delta`` in percent of a."""

    name: str
    a: float | None
    b: float | None
    delta: float | None
    percent: float | None


@dataclass(frozen=True, slots=True)
class SignatureDifference:
    """The compatibility of two signatures. ``known`` False: at least one version has no signature.

    ``breaking``: the changes that break callers of version a if version b replaces it.
    """

    known: bool
    same: bool
    compatible: bool | None
    breaking: list[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of two versions."""

    fields: list[Difference]
    metrics: list[Delta]
    parameters: list[Difference]
    tags: list[Difference]
    capacity: list[Delta]
    signature: SignatureDifference
    requirements_added: list[str]
    requirements_removed: list[str]


def compare(a: Version, b: Version) -> Comparison:
    """Return the comparison of two versions. They may belong to different models."""
    ours, theirs = a.metadata, b.metadata
    fields = [_difference(name, getattr(a, name), getattr(b, name)) for name in _FIELDS]
    named = ("trained_at", *TEXTS, "notes")
    fields += [
        _difference(name, getattr(ours, name) or None, getattr(theirs, name) or None) for name in named
    ]
    fields.append(_difference("verification", a.verification.state, b.verification.state))
    fields.append(_difference("dependencies", ours.dependencies, theirs.dependencies))
    return Comparison(
        fields=fields,
        metrics=deltas(ours.metrics, theirs.metrics),
        parameters=_differences(ours.parameters, theirs.parameters),
        tags=_differences(ours.tags, theirs.tags),
        capacity=deltas(_capacity(a), _capacity(b)),
        signature=_signatures(a.signature, b.signature),
        requirements_added=[line for line in b.requirements if line not in a.requirements],
        requirements_removed=[line for line in a.requirements if line not in b.requirements],
    )


def _capacity(version: Version) -> dict[str, float]:
    """Return the figures of a version's capacity card; empty if the version was not measured."""
    card = version.verification.card
    if card is None:
        return {}
    found = {"memory_mb": float(card.memory_mb), "load_ms": card.load_ms, "start_s": card.start_s}
    if card.requests_per_s is not None:
        found["requests_per_s"] = card.requests_per_s
    for batch in card.batches:
        found |= {f"p50_ms[{batch.rows}]": batch.p50_ms, f"p99_ms[{batch.rows}]": batch.p99_ms}
    return found


def deltas(a: Mapping[str, float], b: Mapping[str, float]) -> list[Delta]:
    """Return the numbers in ``a`` and ``b`` as one Delta for each name, sorted by name."""
    return [_delta(name, a.get(name), b.get(name)) for name in sorted({*a, *b})]


def _delta(name: str, a: float | None, b: float | None) -> Delta:
    if a is None or b is None:
        return Delta(name, a, b, None, None)
    return Delta(name, a, b, b - a, None if a == 0 else 100 * (b - a) / abs(a))


def _signatures(a: Signature | None, b: Signature | None) -> SignatureDifference:
    if a is None or b is None:
        return SignatureDifference(known=False, same=a == b, compatible=None, breaking=[])
    found = breaking_changes(a, b)
    return SignatureDifference(known=True, same=a == b, compatible=not found, breaking=found)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Difference]:
    return [_difference(name, a.get(name), b.get(name)) for name in sorted({*a, *b})]


def _difference(name: str, a: Any, b: Any) -> Difference:
    return Difference(name, a, b, a == b)

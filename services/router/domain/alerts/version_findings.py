"""Turn the drift and the quality of versions into findings for alerts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from services.router.domain.alerts.facts import Finding

SHOWN = 5
# Drift states, worst first.
DRIFT_STATES = ("drifted", "suspect", "steady", "learning", "unknown")

Line = Mapping[str, Any]


def drift_findings(items: Iterable[Line]) -> list[Finding]:
    """Return one finding for each endpoint of each drifted version.

    ``items``: the items of ``GET /v1/drift``.
    """
    found = []
    for item in items:
        drifted = item.get("drifted") or []
        if not drifted:
            continue
        version = _version(item)
        names = ", ".join(drifted[:SHOWN]) + (", ..." if len(drifted) > SHOWN else "")
        many = len(drifted) > 1
        what = f"{len(drifted)} columns of {version} differ" if many else f"1 column of {version} differs"
        text = f"{what} from the baseline: {names}"
        value = float(item.get("score") or len(drifted))
        found += [Finding("Drift", each, version, value, 0.1, text) for each in item.get("endpoints", ())]
    return found


def quality_findings(items: Iterable[Line], places: Iterable[Line]) -> list[Finding]:
    """Return one finding for each endpoint of each version with dropped quality.

    ``items``: the items of ``GET /v1/quality``. ``places``: the items of ``GET /v1/drift``, which name the
    endpoints.
    """
    endpoints = {(each["model"], each["version"]): each.get("endpoints", ()) for each in places}
    found = []
    for item in items:
        if item.get("state") != "dropped":
            continue
        now, first = (item.get("window") or {}).get("measures", {}), item.get("first") or {}
        name, value, limit = _worst(now, first)
        version = _version(item)
        text = (
            f"the quality of {version} dropped: {name} is {value:.3g}; in its first window it was {limit:.3g}"
        )
        found += [
            Finding("QualityDrop", each, version, value, limit, text)
            for each in endpoints.get((item["model"], item["version"]), ())
        ]
    return found


def drift_states(items: Iterable[Line]) -> dict[str, str]:
    """Return the worst drift state among the versions of each endpoint."""
    found: dict[str, list[str]] = {}
    for item in items:
        for endpoint in item.get("endpoints", ()):
            found.setdefault(endpoint, []).append(str(item.get("state", "unknown")))
    return {name: min(states, key=_rank) for name, states in found.items()}


def _rank(state: str) -> int:
    return DRIFT_STATES.index(state) if state in DRIFT_STATES else len(DRIFT_STATES)


def _version(item: Line) -> str:
    return f"{item['model']} v{item['version']}"


def _worst(now: Mapping[str, float], first: Mapping[str, float]) -> tuple[str, float, float]:
    """Return the measure that changed most since the first window, its value now, and its first value."""
    both: Sequence[str] = [name for name in now if first.get(name)]
    name = max(both, key=lambda each: abs(now[each] - first[each]) / abs(first[each]), default="quality")
    return name, float(now.get(name, 0.0)), float(first.get(name, 0.0))

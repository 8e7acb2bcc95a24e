"""Turn the drift of versions into findings that alerts are made of. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from services.router.domain.alerts.facts import Finding

SHOWN = 5


def drift_findings(items: Iterable[Mapping[str, Any]]) -> list[Finding]:
    """Return one finding for each drifted version and endpoint, from the lines of ``GET /v1/drift``."""
    found = []
    for item in items:
        drifted = item.get("drifted") or []
        if not drifted:
            continue
        version = f"{item['model']} v{item['version']}"
        names = ", ".join(drifted[:SHOWN]) + (", ..." if len(drifted) > SHOWN else "")
        text = f"{len(drifted)} columns of {version} differ from the baseline: {names}"
        value = float(item.get("score") or len(drifted))
        found += [Finding("Drift", each, version, value, 0.1, text) for each in item.get("endpoints", ())]
    return found

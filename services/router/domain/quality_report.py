"""Describe a version's quality for JSON. Pure."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from services.router.domain.quality_history import QualityHistory, QualityLimits


def summary(model: str, version: int, history: QualityHistory, limits: QualityLimits) -> dict[str, Any]:
    """Return a version's quality: in the last window, in all closed windows, and as last estimated."""
    last = history.points[-1] if history.points else None
    return {
        "model": model,
        "version": version,
        "state": history.state,
        "reason": "" if last else f"the first window has {history.open.n} of {limits.rows} labels",
        "window": asdict(last) if last else None,
        "first": history.first.measures() if history.first else None,
        "all": {"rows": history.all.n, "measures": history.all.measures()},
        "open": {"rows": history.open.n, "measures": history.open.measures()},
        "estimate": history.estimates[-1] if history.estimates else None,
        "labels_joined": history.joined,
        "labels_unmatched": history.unmatched,
        "predictions_waiting": len(history.waiting),
    }


def detail(model: str, version: int, history: QualityHistory, limits: QualityLimits) -> dict[str, Any]:
    """Return a version's quality with all its windows and estimates."""
    return summary(model, version, history, limits) | {
        "points": [asdict(point) for point in history.points],
        "estimates": history.estimates,
    }

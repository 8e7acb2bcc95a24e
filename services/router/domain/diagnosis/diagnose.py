"""Find the symptoms of an endpoint, and leave out symptoms that another symptom explains. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from services.router.domain.diagnosis.business import adoption_falls, cost_grows, errors_under_load
from services.router.domain.diagnosis.case import Case
from services.router.domain.diagnosis.finding import Symptom, SymptomName
from services.router.domain.diagnosis.latency import feels_slow, inconsistent_times

CHECKS: tuple[Callable[[Case], Symptom | None], ...] = (
    errors_under_load,
    inconsistent_times,
    feels_slow,
    cost_grows,
    adoption_falls,
)
# For each symptom, the symptoms that it explains. Overload causes errors, and also makes requests slow. A
# slow replica also raises p95. A slow model needs more replicas, so it costs more.
EXPLAINED: dict[SymptomName, tuple[SymptomName, ...]] = {
    "errors_under_load": ("feels_slow", "inconsistent_times", "cost_grows"),
    "inconsistent_times": ("feels_slow", "cost_grows"),
    "feels_slow": ("cost_grows",),
}


def diagnose(case: Case) -> list[Symptom]:
    """Return the symptoms of an endpoint, worst first."""
    found = [symptom for check in CHECKS if (symptom := check(case)) is not None]
    explained = {name for symptom in found for name in EXPLAINED.get(symptom.symptom, ())}
    return [symptom for symptom in found if symptom.symptom not in explained]


def report(case: Case, symptoms: list[Symptom]) -> dict[str, Any]:
    """Return the state of one endpoint: ``found``, ``learning`` (no verdict yet), ``idle`` or ``healthy``."""
    if symptoms:
        state, reason = "found", ""
    elif case.learning:
        state, reason = "learning", case.learning
    elif not case.comparable:
        state, reason = "idle", f"{case.recent.requests} requests are too few for a verdict"
    else:
        state, reason = "healthy", ""
    return {"endpoint": case.endpoint, "state": state, "reason": reason, "days": len(case.days)}

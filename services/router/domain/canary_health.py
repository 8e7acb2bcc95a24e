"""Decide if a canary can answer requests at all, from the autoscaler's status of its Deployment. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# A canary without ready replicas is rolled back if its model has failed to load for this many seconds.
LOAD_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class CanaryHealth:
    """The reasons why a canary cannot answer requests.

    ``waits``: why it gets no requests now. ``broken``: why it must be rolled back. Both are empty if the
    canary has a ready replica, or if its status is unknown.
    """

    waits: str = ""
    broken: str = ""


def health_of(name: str, ready: int, status: Mapping[str, Any] | None, now: float) -> CanaryHealth:
    """Return the health of a canary.

    ``status``: its Deployment's status from the autoscaler; None if not published.
    """
    if ready or status is None:
        return CanaryHealth()
    conditions = {each["type"]: each for each in status.get("conditions", ())}
    loaded, place, state = (conditions.get(kind) for kind in ("Loaded", "Placeable", "Ready"))
    more = f"`tidegate why {name}` says more"
    if loaded is not None and not loaded["ok"]:
        if now - loaded["at"] >= LOAD_PATIENCE_S:
            return CanaryHealth(broken=f"{name} does not start: {loaded['message']}")
        return CanaryHealth(f"{name} does not start: {loaded['message']}")
    if place is not None and not place["ok"]:
        return CanaryHealth(
            f"{name} has no ready replica: {place['message']}. Or replace the present version without a "
            "canary: `tidegate rollout ENDPOINT --to VERSION --swap`"
        )
    if state is not None and state["reason"] == "Paused":
        return CanaryHealth(f"{name} is held at 0 replicas: `tidegate scale {name} --auto` ends the override")
    return CanaryHealth(f"{name} has no ready replica yet; {more}")

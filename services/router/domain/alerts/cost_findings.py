"""Turn used-up budgets and reached cost caps into findings for alerts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from services.router.domain.alerts.facts import Finding
from services.router.domain.watch.readings import deployments_of
from tidegate.kernel.protocol.models import Endpoint

# Rules of the autoscaler that limit replicas because of their cost.
COST_RULES = ("budget", "cost cap")


def cost_findings(endpoints: Iterable[Endpoint], statuses: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Return a finding for each Deployment of each endpoint, if a cost rule limits the Deployment."""
    found = []
    for endpoint in endpoints:
        for name in deployments_of(endpoint):
            status = statuses.get(name, {})
            if status.get("rule") in COST_RULES:
                cost = float(status.get("cost_per_hour") or 0.0)
                text = f"the cost of {name} limits its replicas: {status.get('reason') or status['rule']}"
                found.append(Finding("CostCap", endpoint.name, name, cost, cost, text))
    return found

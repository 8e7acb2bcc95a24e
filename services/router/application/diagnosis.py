"""Diagnose endpoints: compare the last minutes of each with its own past."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from services.router.adapters.registry_cache import RegistryCache
from services.router.application.endpoint_watch import EndpointWatch
from services.router.domain.diagnosis.case import DeploymentFacts, Spans, case_of
from services.router.domain.diagnosis.diagnose import diagnose, report
from services.router.domain.watch.readings import deployments_of
from tidegate.kernel.protocol.models import Deployment, Endpoint


class Diagnosis:
    """The diagnosis of endpoints, which runs when a caller requests it."""

    def __init__(self, watch: EndpointWatch, registry: RegistryCache) -> None:
        self._watch = watch
        self._registry = registry

    async def of(self, endpoints: Sequence[Endpoint], spans: Spans) -> dict[str, Any]:
        """Return the symptoms and the state of these endpoints."""
        now = self._watch.last.at
        items: list[dict[str, Any]] = []
        states: list[dict[str, Any]] = []
        for endpoint in endpoints:
            history, facts = self._watch.history.of(endpoint.name), self._facts(endpoint)
            # Adding up the minutes of several days takes long. In a thread, it does not block the event loop.
            case = await asyncio.to_thread(case_of, endpoint.name, history, facts, spans, now)
            symptoms = await asyncio.to_thread(diagnose, case)
            items += [each.to_json() for each in symptoms]
            states.append(report(case, symptoms))
        return {"at": now, "items": items, "endpoints": states}

    def _facts(self, endpoint: Endpoint) -> list[DeploymentFacts]:
        desired = self._registry.desired
        known = {each.name: each for each in desired.deployments} if desired is not None else {}
        statuses = self._watch.last.statuses
        return [
            facts_of(known[name], statuses.get(name, {}))
            for name in deployments_of(endpoint)
            if name in known
        ]


def facts_of(deployment: Deployment, status: Mapping[str, Any]) -> DeploymentFacts:
    """Return a Deployment's facts. ``status``: the autoscaler's status as JSON; empty if unknown."""
    override = deployment.override
    full = any(
        each.get("reason") == "HostFull" for each in status.get("conditions", ()) if not each.get("ok")
    )
    return DeploymentFacts(
        deployment.name,
        deployment.model,
        deployment.version,
        deployment.min_replicas,
        deployment.max_replicas,
        status.get("ready", 0),
        status.get("desired", 0),
        None if override is None else override.replicas,
        full,
    )

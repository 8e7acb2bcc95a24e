"""Wake sleeping Deployments before they get traffic. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from services.registry.domain import rollover
from services.registry.domain.desired_state import Change, PutDeployment, RegistrySnapshot, StoredEndpoint
from tidegate.kernel.protocol.models import EndpointSpec


def wake(snapshot: RegistrySnapshot, name: str, deployments: Sequence[str]) -> list[Change]:
    """Return the changes that wake sleeping Deployments before they get traffic.

    Each Deployment gets the scaling settings of one target of Endpoint ``name``: the target with the largest
    weight. A Deployment does not change if a user declared it, or if it has traffic already.
    """
    scale = rollover.scale_of(snapshot, snapshot.endpoint(name))
    changes: list[Change] = []
    for each in deployments:
        stored = snapshot.deployments.get(each)
        if stored is None or stored.declared or each in snapshot.with_traffic():
            continue
        spec = stored.spec.model_copy(update=scale)
        if spec != stored.spec:
            changes.append(PutDeployment(replace(stored, spec=spec), created=False))
    return changes


def wake_failovers(
    snapshot: RegistrySnapshot, stored: EndpointSpec | None, spec: EndpointSpec
) -> list[Change]:
    """Return the changes that wake the sleeping Deployments that ``spec`` newly names as failover.

    Without a ready replica, a Deployment gets no requests as failover. ``stored``: the Endpoint before the
    change; None for a new Endpoint. Each Deployment gets the scaling settings of the target with the largest
    weight. A Deployment does not change if a user declared it, or if it has traffic.
    """
    before = stored.failover if stored is not None else []
    scale = rollover.scale_of(snapshot, StoredEndpoint(spec))
    endpoints = [each.spec for each in snapshot.endpoints.values()]
    busy = {
        target.deployment for each in endpoints for target in [*each.targets, *each.previous] if target.weight
    }
    changes: list[Change] = []
    for name in spec.failover:
        deployment = snapshot.deployments[name]
        woken = deployment.spec.model_copy(update=scale)
        sleeps = deployment.spec == rollover.asleep_spec(deployment.spec) != woken
        if sleeps and not deployment.declared and name not in busy and name not in before:
            changes.append(PutDeployment(replace(deployment, spec=woken), created=False))
    return changes

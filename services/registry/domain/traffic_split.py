"""Split an Endpoint's traffic among several Deployments. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from services.registry.domain import edits, rollover
from services.registry.domain.desired_state import Change, PutDeployment, RegistrySnapshot
from tidegate.kernel.protocol.models import Target


def split(snapshot: RegistrySnapshot, name: str, targets: Sequence[Target]) -> list[Change]:
    """Return the changes that split the Endpoint's traffic by these weights.

    The current Deployments serve until each new target with a weight is ready. A sleeping Deployment that
    `deploy` created gets the scale of the one that serves now.
    """
    spec = snapshot.endpoint(name).spec
    serving = spec.previous or spec.targets
    current = {target.deployment for target in serving if target.weight}
    new = [target.deployment for target in targets if target.weight and target.deployment not in current]
    changed = rollover.without_own_shadow(spec.model_copy(update={"targets": list(targets)}))
    fields: dict[str, Any] = changed.model_dump() | {
        "targets": [target.model_dump() for target in targets],
        "previous": [target.model_dump() for target in serving] if new else [],
        "rollout": edits.ended_by_hand(spec.rollout, "an operator split the traffic"),
    }
    return [*wake(snapshot, name, new), *edits.put_endpoint(snapshot, name, fields)]


def wake(snapshot: RegistrySnapshot, name: str, deployments: Sequence[str]) -> list[Change]:
    """Return the changes that give sleeping Deployments the scale of the one that serves now."""
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

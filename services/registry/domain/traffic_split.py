"""Sharing an endpoint's traffic among several Deployments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from services.registry.domain import edits, rollover
from services.registry.domain.desired_state import Change, PutDeployment, RegistrySnapshot
from tidegate.kernel.protocol.models import Target


def split(snapshot: RegistrySnapshot, name: str, targets: Sequence[Target]) -> list[Change]:
    """Return the changes after which the Endpoint shares its traffic by these weights.

    If one of the targets does not serve yet, what serves now goes on until each target with a weight is
    ready. A Deployment that `deploy` made and that sleeps gets the scale that is needed now.
    """
    held = snapshot.endpoint(name).spec
    serving = held.previous or held.targets
    known = {target.deployment for target in serving if target.weight}
    fresh = [target.deployment for target in targets if target.weight and target.deployment not in known]
    fields: dict[str, Any] = held.model_dump() | {
        "targets": [target.model_dump() for target in targets],
        "previous": [target.model_dump() for target in serving] if fresh else [],
    }
    return [*_woken(snapshot, name, fresh), *edits.put_endpoint(snapshot, name, fields)]


def _woken(snapshot: RegistrySnapshot, name: str, fresh: Sequence[str]) -> list[Change]:
    scale = rollover.scale_of(snapshot, snapshot.endpoint(name))
    changes: list[Change] = []
    for each in fresh:
        held = snapshot.deployments.get(each)
        if held is None or held.declared or each in snapshot.carrying():
            continue
        spec = held.spec.model_copy(update=scale)
        if spec != held.spec:
            changes.append(PutDeployment(replace(held, spec=spec), created=False))
    return changes

"""Plan the split of an Endpoint's traffic among Deployments. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.registry.domain import edits, experiments, rollover, waking
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.protocol.models import Target


def split(snapshot: RegistrySnapshot, name: str, targets: Sequence[Target]) -> list[Change]:
    """Return the changes that split an Endpoint's traffic among ``targets`` by their weights.

    The current Deployments serve until each new target with a weight is ready. A sleeping Deployment that
    `deploy` created gets the scale of the Deployment that serves now.
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
        **experiments.ended_by_hand(spec, "an operator split the traffic"),
    }
    return [*waking.wake(snapshot, name, new), *edits.put_endpoint(snapshot, name, fields)]

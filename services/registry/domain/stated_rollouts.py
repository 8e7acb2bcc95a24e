"""Plan to create or replace an Endpoint with a canary, for `tidegate apply` and ``PUT``. Pure.

A file states the current targets and the canary. It can be applied repeatedly: a running canary continues,
and a canary that has ended is not started a second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from services.registry.domain import edits, merge, rollouts
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.protocol.models import CanaryOptions, EndpointSpec, Name, Noun, Target


class StatedRollout(Noun):
    """A canary in a file: its Deployment and its options."""

    deployment: Name
    options: CanaryOptions = CanaryOptions()


@dataclass(frozen=True, slots=True)
class RolloutStart:
    """The id and the start time (Unix time in seconds) for a new rollout."""

    id: str
    now: float


def put_endpoint(
    snapshot: RegistrySnapshot,
    name: str,
    fields: edits.Fields,
    *,
    start: RolloutStart,
) -> list[Change]:
    """Plan to create or replace an Endpoint, and to start the canary in its fields.

    If ``rollout`` in ``fields`` has an ``id``, it is a rollout that the registry has stored before. Then it
    is written unchanged, and no canary starts. Raise the errors of :func:`edits.put_endpoint`.
    """
    stated, stored = fields.get("rollout"), snapshot.endpoints.get(name)
    if not isinstance(stated, Mapping) or stated.get("id"):
        if stored is not None and "rollout" not in fields and _is_baseline(stored.spec, fields):
            fields = _kept(stored.spec, fields)
        return edits.put_endpoint(snapshot, name, fields, start.now)
    wanted = merge.checked(StatedRollout, stated, f"Endpoint {name!r}: rollout")
    if stored is not None and _is_known(stored.spec, wanted):
        return edits.put_endpoint(snapshot, name, _kept(stored.spec, fields), start.now)
    others = {key: value for key, value in fields.items() if key != "rollout"}
    changes = edits.put_endpoint(snapshot, name, others, start.now)
    after = snapshot.after(changes)
    started = rollouts.start(after, name, wanted.deployment, wanted.options, start.id, start.now)
    return [*changes, *started]


def _kept(stored: EndpointSpec, fields: edits.Fields) -> dict[str, Any]:
    """Return the fields with the stored targets and the stored rollout."""
    kept = stored.model_dump(include={"targets", "previous", "rollout"})
    return {**fields, **kept}


def _is_known(stored: EndpointSpec, wanted: StatedRollout) -> bool:
    """Return True if the Endpoint's last canary has the stated Deployment and options."""
    held = stored.rollout
    return held is not None and (held.deployment, held.options) == (wanted.deployment, wanted.options)


def _is_baseline(stored: EndpointSpec, fields: edits.Fields) -> bool:
    """Return True if the stated targets are the baseline of a running canary. Then the canary continues."""
    if stored.rollout is None or not stored.rollout.active or not isinstance(fields.get("targets"), list):
        return False
    targets = [merge.checked(Target, each, "targets") for each in fields["targets"]]
    return [target for target in targets if target.weight] == stored.rollout.base

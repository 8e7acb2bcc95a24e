"""Plan the start, end and promotion of shadow traffic. Pure.

A shadow does not change the Endpoint's targets. A sleeping Deployment stays asleep, unless the shadow has
``wake``. When the shadow ends, its Deployment goes to sleep if nothing else uses it.
"""

from __future__ import annotations

from services.registry.domain import edits, names, rollover, waking
from services.registry.domain.desired_state import Change, RegistrySnapshot
from tidegate.kernel.errors import BadRequest, NotFound
from tidegate.kernel.protocol.models import Shadow, Target


def version_changes(
    snapshot: RegistrySnapshot, name: str, version: int, *, wake: bool
) -> tuple[list[Change], str]:
    """Return the changes that give a version a Deployment, and the name of this Deployment.

    If no Deployment runs the version, the changes create one. Without ``wake``, an existing Deployment is not
    changed, so it stays asleep if it sleeps. With ``wake``, a Deployment without traffic gets the scaling
    settings of the Deployment that serves now. Raise NotFound for an unknown Endpoint or version.
    """
    spec = snapshot.endpoint(name).spec
    model = snapshot.heaviest(spec.targets).model
    deployment = names.of_deployment(model, version)
    found = _existing(snapshot, model, version, deployment)
    if found is not None and not wake:
        return [], found
    plan = rollover.deploy(
        snapshot,
        rollover.DeployRequest(model, version, {"name": found or deployment}, endpoint=name, traffic=False),
    )
    return plan.changes, plan.deployment


def start(snapshot: RegistrySnapshot, name: str, shadow: Shadow) -> list[Change]:
    """Plan the start of shadow traffic. It replaces an earlier shadow.

    Raise NotFound for an unknown Endpoint or Deployment, BadRequest if the Deployment gets traffic already.
    """
    stored = snapshot.endpoint(name)
    if shadow.deployment not in snapshot.deployments:
        raise names.unknown("Deployment", shadow.deployment)
    if shadow.deployment in {target.deployment for target in stored.spec.targets if target.weight}:
        raise BadRequest(
            f"{shadow.deployment} gets traffic of Endpoint {name!r} already, so it cannot be the shadow. "
            f"`tidegate traffic {name}` shows the shares."
        )
    changed = stored.spec.model_copy(update={"shadow": shadow})
    woken = waking.wake(snapshot, name, [shadow.deployment]) if shadow.wake else []
    return [*woken, *rollover.replace_endpoint(snapshot.after(woken), stored.spec, changed)]


def stop(snapshot: RegistrySnapshot, name: str, id: str | None = None) -> list[Change]:
    """Plan the end of an Endpoint's shadow traffic. Change nothing if it has no shadow.

    ``id``: end only the shadow with this id; None means any shadow. Raise NotFound for an unknown Endpoint.
    """
    spec = snapshot.endpoint(name).spec
    if spec.shadow is not None and id is not None and spec.shadow.id != id:
        return []
    return rollover.replace_endpoint(snapshot, spec, spec.model_copy(update={"shadow": None}))


def promote(snapshot: RegistrySnapshot, name: str) -> list[Change]:
    """Plan to make the shadow's Deployment the only target. The current targets serve until it is ready.

    Raise NotFound if the Endpoint has no shadow.
    """
    spec = snapshot.endpoint(name).spec
    if spec.shadow is None:
        raise NotFound(
            f"Endpoint {name!r} has no rollout and no shadow. Start one: "
            f"`tidegate rollout {name} --to VERSION`."
        )
    deployment = spec.shadow.deployment
    woken = waking.wake(snapshot, name, [deployment])
    fields = spec.model_dump() | {
        "targets": [Target(deployment=deployment).model_dump()],
        "previous": [target.model_dump() for target in spec.previous or spec.targets],
        "shadow": None,
    }
    return [*woken, *edits.put_endpoint(snapshot.after(woken), name, fields)]


def _existing(snapshot: RegistrySnapshot, model: str, version: int, preferred: str) -> str | None:
    """Return a Deployment that runs a version: the preferred one, or else the first by name, or None."""
    those = sorted(
        name
        for name, stored in snapshot.deployments.items()
        if (stored.spec.model, stored.spec.version) == (model, version)
    )
    return preferred if preferred in those else next(iter(those), None)

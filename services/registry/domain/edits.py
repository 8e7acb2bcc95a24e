"""Plan edits of the desired state: put, patch, delete, and `apply` a file. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from services.registry.domain import experiments, merge, names, rollover, waking
from services.registry.domain.desired_state import (
    Change,
    DropDeployment,
    DropEndpoint,
    PutDeployment,
    PutEndpoint,
    RegistrySnapshot,
    StoredDeployment,
    all_named_in,
    deployments_in,
)
from services.registry.domain.differences import FieldChange
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol.models import DeploymentSpec, EndpointSpec, Override, Rollout, Shadow
from tidegate.kernel.protocol.names import LONGEST
from tidegate.kernel.protocol.reserves import fits, reserve_of, reserved_targets

Fields = Mapping[str, Any]
# The fields of a Deployment that control how it scales.
POLICY_FIELDS = ("min_replicas", "max_replicas", "scale_to_zero_after_s", "target_wait_ms", "scaling")


@dataclass(frozen=True, slots=True)
class ApplyOutcome:
    """The effect of `apply` on one object.

    ``kept``: the file does not name the Deployment, but an Endpoint does, so it stays. ``reason``: which
    Endpoint. ``changes``: the changed fields of an object that existed before.
    """

    kind: str  # model, deployment or endpoint
    name: str
    action: Literal["created", "updated", "unchanged", "deleted", "kept"]
    changes: Sequence[FieldChange] = ()
    reason: str = ""


def put_deployment(snapshot: RegistrySnapshot, name: str, fields: Fields) -> list[Change]:
    """Plan to create or replace a Deployment. Absent fields get their defaults.

    Raise BadRequest for invalid fields, Conflict if the stored Deployment has another version.
    """
    names.check_new("Deployment", name, snapshot.deployments)
    stored = snapshot.deployments.get(name)
    spec = merge.deployment({}, _named(name, fields), f"Deployment {name!r}")
    if stored is None:
        require_version(snapshot, spec.model, spec.version)
        return [PutDeployment(StoredDeployment(spec, declared=True), created=True)]
    _same_version(stored.spec, spec)
    return _changed(stored, replace(stored, spec=spec, declared=True))


def patch_deployment(snapshot: RegistrySnapshot, name: str, fields: Fields) -> list[Change]:
    """Plan to change some options of a Deployment.

    Raise NotFound for an unknown Deployment, or BadRequest for invalid fields. Raise Conflict if ``fields``
    has another version.
    """
    stored = snapshot.deployment(name)
    spec = merge.deployment(stored.spec.model_dump(), _named(name, fields), f"Deployment {name!r}")
    _same_version(stored.spec, spec)
    return _changed(stored, replace(stored, spec=spec))


def change_policy(snapshot: RegistrySnapshot, name: str, fields: Fields) -> list[Change]:
    """Plan to change how a Deployment scales. Raise BadRequest for fields that do not control scaling."""
    other = sorted(set(fields) - set(POLICY_FIELDS))
    if other:
        raise BadRequest(
            f"A policy has the fields {', '.join(POLICY_FIELDS)}, not {', '.join(other)[:80]}. "
            "Use PATCH /v1/deployments/NAME for other fields."
        )
    return patch_deployment(snapshot, name, fields)


def delete_deployment(snapshot: RegistrySnapshot, name: str) -> list[Change]:
    """Plan to delete a Deployment. Raise NotFound if it does not exist.

    Raise Conflict while an Endpoint names it as target, previous target, shadow or failover. Also raise it
    while a traffic rule names it.
    """
    snapshot.deployment(name)
    users = sorted(e for e, stored in snapshot.endpoints.items() if name in deployments_in(stored.spec))
    if users:
        endpoints = "Endpoints" if len(users) > 1 else "Endpoint"
        raise Conflict(
            f"Deployment {name!r} is in use by {endpoints} {names.quoted(users)}. Move its traffic away "
            "with `tidegate split`, or delete the Endpoint, and try again."
        )
    users = sorted(e for e, stored in snapshot.endpoints.items() if name in stored.spec.failover)
    if users:
        endpoints = "Endpoints" if len(users) > 1 else "Endpoint"
        raise Conflict(
            f"Deployment {name!r} is the failover of {endpoints} {names.quoted(users)}. Choose another "
            f"failover with `tidegate traffic {users[0]} --failover DEPLOYMENT` (none: no failover), and "
            "try again."
        )
    return [DropDeployment(name)]


def set_override(snapshot: RegistrySnapshot, name: str, override: Override | None) -> list[Change]:
    """Plan to set an operator's override of the number of replicas.

    ``override`` None: remove the override. Raise NotFound for an unknown Deployment.
    """
    stored = snapshot.deployment(name)
    return _changed(stored, replace(stored, override=override))


def put_endpoint(snapshot: RegistrySnapshot, name: str, fields: Fields, now: float = 0.0) -> list[Change]:
    """Plan to create or replace an Endpoint.

    If ``fields`` has no ``previous``, the current Deployments serve until the new targets are ready. An
    experiment without an id starts at ``now`` (Unix time in seconds). Raise BadRequest for invalid fields.
    """
    names.check_new("Endpoint", name, snapshot.endpoints)
    stored = snapshot.endpoints.get(name)
    spec = merge.checked(EndpointSpec, _named(name, fields), f"Endpoint {name!r}")
    _check_targets(snapshot, spec)
    woken = waking.wake_failovers(snapshot, stored.spec if stored is not None else None, spec)
    if stored is None:
        return experiments.begun(snapshot, [*woken, PutEndpoint(spec, created=True)], spec, now)
    spec = experiments.kept(stored.spec, spec, fields)
    if "rollout" not in fields:
        spec = spec.model_copy(update={"rollout": _kept_rollout(stored.spec, spec)})
    spec = spec.model_copy(update={"shadow": _identified(stored.spec.shadow, spec.shadow)})
    if "previous" not in fields:
        spec = rollover.with_previous(stored.spec, spec)
    changes = rollover.replace_endpoint(snapshot, stored.spec, spec)
    return experiments.begun(snapshot, [*woken, *changes], spec, now)


def _identified(stored: Shadow | None, stated: Shadow | None) -> Shadow | None:
    """Return ``stated``. If it describes the stored shadow, add the id of that shadow.

    ``stated`` describes the stored shadow if ``stated`` has no id, and the two shadows are equal in all other
    fields.
    """
    if stored is None or stated is None or stated.id:
        return stated
    same = stated.model_copy(update={"id": stored.id})
    return same if same == stored else stated


def ended_by_hand(rollout: Rollout | None, reason: str) -> Rollout | None:
    """Return an Endpoint's rollout after a change by an operator. An active rollout becomes aborted."""
    if rollout is None or not rollout.active:
        return rollout
    return rollout.model_copy(update={"phase": "aborted", "reason": reason})


def _kept_rollout(stored: EndpointSpec, spec: EndpointSpec) -> Rollout | None:
    if spec.targets == stored.targets:
        return stored.rollout
    return ended_by_hand(stored.rollout, "an operator set the endpoint's targets")


def delete_endpoint(snapshot: RegistrySnapshot, name: str) -> list[Change]:
    """Plan to delete an Endpoint, but not its Deployments. Raise NotFound for an unknown Endpoint."""
    snapshot.endpoint(name)
    return [DropEndpoint(name)]


def apply(
    snapshot: RegistrySnapshot,
    deployments: Sequence[Fields],
    endpoints: Sequence[Fields],
    put: Callable[[RegistrySnapshot, str, Fields], list[Change]] = put_endpoint,
    models: Sequence[Fields] = (),
    put_model: Callable[[RegistrySnapshot, str, Fields], list[Change]] | None = None,
) -> tuple[list[Change], list[ApplyOutcome]]:
    """Plan to create or replace all objects of a file. Raise an error if any object is invalid.

    Return the changes and the outcome for each object, models first. ``put``: the function that plans one
    Endpoint. ``put_model``: the function that plans one model.
    """
    stated = [("model", each) for each in models]
    stated += [("deployment", each) for each in deployments] + [("endpoint", each) for each in endpoints]
    _check_unique(stated)
    changes: list[Change] = []
    outcomes: list[ApplyOutcome] = []
    for kind, fields in stated:
        name = str(fields.get("name", ""))
        if kind == "model" and put_model is not None:
            step = put_model(snapshot, name, fields)
            outcomes.append(ApplyOutcome("model", name, _action(step, exists=True)))
        elif kind == "deployment":
            step, exists = put_deployment(snapshot, name, fields), name in snapshot.deployments
            outcomes.append(ApplyOutcome("deployment", name, _action(step, exists)))
        else:
            step, exists = put(snapshot, name, fields), name in snapshot.endpoints
            outcomes.append(ApplyOutcome("endpoint", name, _action(step, exists)))
        snapshot = snapshot.after(step)
        changes += step
    return changes, outcomes


def prune(
    snapshot: RegistrySnapshot, deployments: Sequence[Fields], endpoints: Sequence[Fields]
) -> tuple[list[Change], list[ApplyOutcome]]:
    """Plan to delete all Deployments and Endpoints that a file does not name, after :func:`apply`.

    A Deployment that a remaining Endpoint names is kept: for example, it may serve until the Endpoint's new
    targets are ready. Return the changes and their outcomes. Raise BadRequest if the file names no Deployment
    and no Endpoint, because then prune would delete everything.
    """
    if not deployments and not endpoints:
        raise BadRequest(
            "The file names no Deployment and no Endpoint, so prune would delete all of them. Name what must "
            "stay, or delete single objects with `tidegate delete`."
        )
    named = {str(each.get("name")) for each in endpoints}
    gone = sorted(snapshot.endpoints.keys() - named)
    changes: list[Change] = [DropEndpoint(name) for name in gone]
    outcomes = [ApplyOutcome("endpoint", name, "deleted") for name in gone]
    remaining = [stored.spec for name, stored in sorted(snapshot.endpoints.items()) if name in named]
    for name in sorted(snapshot.deployments.keys() - {str(each.get("name")) for each in deployments}):
        users = [spec.name for spec in remaining if name in all_named_in(spec)]
        if users:
            reason = f"still used by Endpoint {names.quoted(users)}"
            outcomes.append(ApplyOutcome("deployment", name, "kept", reason=reason))
        else:
            changes.append(DropDeployment(name))
            outcomes.append(ApplyOutcome("deployment", name, "deleted"))
    return changes, outcomes


def check_deletions(outcomes: Sequence[ApplyOutcome], allowed: Collection[str]) -> None:
    """Raise Conflict if prune would delete an object that is not in ``allowed``.

    ``allowed``: kinds and names, such as ``endpoint fraud``.
    """
    deleted = [f"{each.kind} {each.name}" for each in outcomes if each.action == "deleted"]
    if others := sorted(set(deleted) - set(allowed)):
        raise Conflict(
            f"prune would now also delete {names.quoted(others)}, because something has changed. Nothing was "
            "deleted. Run the command again, and check the list."
        )


def require_version(snapshot: RegistrySnapshot, model: str, number: int) -> None:
    """Raise BadRequest unless this version is registered. The message lists the registered versions."""
    if (model, number) in snapshot.versions:
        return
    numbers = ", ".join(map(str, snapshot.numbers(model)))
    existing = f"It has {numbers}" if numbers else "This model does not exist"
    raise BadRequest(f"Version {number} of model {model!r} is not registered. {existing}.")


def _named(name: str, fields: Fields) -> dict[str, Any]:
    in_body = fields.get("name", name)
    if in_body != name:
        raise BadRequest(f"The name in the body is {in_body!r}, but the path has {name!r}: use one name.")
    return {**fields, "name": name}


def _same_version(stored: DeploymentSpec, spec: DeploymentSpec) -> None:
    if (stored.model, stored.version) != (spec.model, spec.version):
        raise Conflict(
            f"Deployment {stored.name!r} runs version {stored.version} of model {stored.model!r}, and that "
            f"cannot change. Create another Deployment for version {spec.version} of {spec.model!r} and "
            "make it the Endpoint's target: `tidegate deploy` does both."
        )


def _changed(before: StoredDeployment, after: StoredDeployment) -> list[Change]:
    return [] if before == after else [PutDeployment(after, created=False)]


def _check_targets(snapshot: RegistrySnapshot, spec: EndpointSpec) -> None:
    for role, targets in (("targets", spec.targets), ("previous", spec.previous)):
        for name, times in Counter(target.deployment for target in targets).items():
            if times > 1:
                raise BadRequest(
                    f"Endpoint {spec.name!r}: {role} names Deployment {name!r} twice. Name it only once."
                )
            if name not in snapshot.deployments:
                raise BadRequest(
                    f"Endpoint {spec.name!r}: {role} names Deployment {name!r}, which does not exist."
                )
    for rule in spec.rules:
        if rule.deployment not in snapshot.deployments:
            raise BadRequest(
                f"Endpoint {spec.name!r}: a rule names Deployment {rule.deployment!r}, which does not exist."
            )
    for name in spec.failover:
        if name not in snapshot.deployments:
            raise BadRequest(
                f"Endpoint {spec.name!r}: failover names Deployment {name!r}, which does not exist."
            )
    _check_reserved(spec)
    _check_shadow(snapshot, spec)
    if not sum(target.weight for target in spec.targets):
        raise BadRequest(
            f"Endpoint {spec.name!r}: all weights are 0, so no target would get a request. Set at least one "
            "weight above 0."
        )


def _check_reserved(spec: EndpointSpec) -> None:
    for name in reserved_targets(spec):
        if not fits(name, spec.name):
            raise BadRequest(
                f"Endpoint {spec.name!r}: its name and that of {name!r} are too long for reserved replicas. "
                f"Together they may have at most {LONGEST - len(reserve_of('', ''))} characters."
            )


def _check_shadow(snapshot: RegistrySnapshot, spec: EndpointSpec) -> None:
    if spec.shadow is None:
        return
    name = spec.shadow.deployment
    if name not in snapshot.deployments:
        raise BadRequest(
            f"Endpoint {spec.name!r}: its shadow is Deployment {name!r}, which does not exist. Create one "
            "without traffic: `tidegate deploy MODEL --version N --no-traffic`."
        )
    if name in {target.deployment for target in spec.targets if target.weight}:
        raise BadRequest(
            f"Endpoint {spec.name!r}: Deployment {name} gets traffic, so it cannot also be the shadow. Name "
            f"a Deployment without a share, or set the weight of {name} to 0."
        )


def _check_unique(stated: Sequence[tuple[str, Fields]]) -> None:
    for (kind, name), times in Counter((kind, str(each.get("name", ""))) for kind, each in stated).items():
        if not name:
            raise BadRequest(f"Each {kind} of the file needs a name.")
        if times > 1:
            raise BadRequest(f"The file has {kind} {name!r} {times} times. Keep only one.")


def _action(step: list[Change], exists: bool) -> Literal["created", "updated", "unchanged"]:
    if not step:
        return "unchanged"
    return "updated" if exists else "created"

"""Intention stated object by object: put, patch and delete Deployments and Endpoints, and `apply`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from services.registry.domain import merge, names, rollover
from services.registry.domain.desired_state import (
    Change,
    DropDeployment,
    DropEndpoint,
    PutDeployment,
    PutEndpoint,
    RegistrySnapshot,
    StoredDeployment,
    expect_revision,
    named_by,
)
from tidegate.kernel.errors import BadRequest, Conflict
from tidegate.kernel.protocol.models import DeploymentSpec, EndpointSpec, Override

Fields = Mapping[str, Any]
# How a Deployment scales, and nothing of what it runs.
POLICY_FIELDS = ("min_replicas", "max_replicas", "scale_to_zero_after_s", "target_wait_ms", "scaling")


@dataclass(frozen=True, slots=True)
class ApplyOutcome:
    """What `apply` did to one object."""

    kind: Literal["deployment", "endpoint"]
    name: str
    action: Literal["created", "updated", "unchanged"]


def put_deployment(
    snapshot: RegistrySnapshot, name: str, fields: Fields, expected: int | None = None
) -> list[Change]:
    """State a Deployment in full; what is left out has its default. Its version cannot change."""
    names.check_new("Deployment", name, snapshot.deployments)
    held = snapshot.deployments.get(name)
    expect_revision(f"Deployment {name!r}", held.revision if held else None, expected)
    spec = merge.deployment({}, _named(name, fields), f"Deployment {name!r}")
    if held is None:
        require_version(snapshot, spec.model, spec.version)
        return [PutDeployment(StoredDeployment(spec, declared=True), created=True)]
    _same_version(held.spec, spec)
    return _changed(held, replace(held, spec=spec, declared=True))


def patch_deployment(
    snapshot: RegistrySnapshot, name: str, fields: Fields, expected: int | None = None
) -> list[Change]:
    """Change some options of a Deployment and leave the others."""
    held = snapshot.deployment(name)
    expect_revision(f"Deployment {name!r}", held.revision, expected)
    spec = merge.deployment(held.spec.model_dump(), _named(name, fields), f"Deployment {name!r}")
    _same_version(held.spec, spec)
    return _changed(held, replace(held, spec=spec))


def change_policy(snapshot: RegistrySnapshot, name: str, fields: Fields) -> list[Change]:
    """Change how a Deployment scales. Raise BadRequest for a field of what it runs."""
    other = sorted(set(fields) - set(POLICY_FIELDS))
    if other:
        raise BadRequest(f"A policy has the fields {', '.join(POLICY_FIELDS)}, not {', '.join(other)[:80]}.")
    return patch_deployment(snapshot, name, fields)


def delete_deployment(snapshot: RegistrySnapshot, name: str) -> list[Change]:
    """Forget a Deployment; Conflict while an endpoint names it."""
    snapshot.deployment(name)
    users = sorted(e for e, held in snapshot.endpoints.items() if name in named_by(held.spec))
    if users:
        raise Conflict(f"Deployment {name!r} is in use by {_listed('Endpoint', users)}.")
    return [DropDeployment(name)]


def set_override(snapshot: RegistrySnapshot, name: str, override: Override | None) -> list[Change]:
    """An operator's word on the number of replicas, or its withdrawal."""
    held = snapshot.deployment(name)
    return _changed(held, replace(held, override=override))


def put_endpoint(
    snapshot: RegistrySnapshot, name: str, fields: Fields, expected: int | None = None
) -> list[Change]:
    """State an Endpoint. Unless ``previous`` is given, what serves now goes on until a target is ready."""
    names.check_new("Endpoint", name, snapshot.endpoints)
    held = snapshot.endpoints.get(name)
    expect_revision(f"Endpoint {name!r}", held.revision if held else None, expected)
    spec = merge.checked(EndpointSpec, _named(name, fields), f"Endpoint {name!r}")
    _check_targets(snapshot, spec)
    if held is None:
        return [PutEndpoint(spec, created=True)]
    if "previous" not in fields:
        spec = rollover.turned(held.spec, spec)
    return rollover.with_retired(snapshot, held.spec, spec)


def delete_endpoint(snapshot: RegistrySnapshot, name: str) -> list[Change]:
    """Forget an Endpoint; its Deployments stay."""
    snapshot.endpoint(name)
    return [DropEndpoint(name)]


def apply(
    snapshot: RegistrySnapshot, deployments: Sequence[Fields], endpoints: Sequence[Fields]
) -> tuple[list[Change], list[ApplyOutcome]]:
    """Everything that a declarative file states, as one plan: all of it or, on any error, nothing."""
    stated = [("deployment", each) for each in deployments] + [("endpoint", each) for each in endpoints]
    _once_each(stated)
    changes: list[Change] = []
    outcomes: list[ApplyOutcome] = []
    for kind, fields in stated:
        name = str(fields.get("name", ""))
        if kind == "deployment":
            step, known = put_deployment(snapshot, name, fields), name in snapshot.deployments
            outcomes.append(ApplyOutcome("deployment", name, _action(step, known)))
        else:
            step, known = put_endpoint(snapshot, name, fields), name in snapshot.endpoints
            outcomes.append(ApplyOutcome("endpoint", name, _action(step, known)))
        snapshot = snapshot.after(step)
        changes += step
    return changes, outcomes


def require_version(snapshot: RegistrySnapshot, model: str, number: int) -> None:
    """Raise BadRequest, saying what there is, unless this version is registered."""
    if (model, number) in snapshot.versions:
        return
    there = ", ".join(map(str, snapshot.numbers(model)))
    known = f"it has {there}" if there else "there is no such model"
    raise BadRequest(f"Version {number} of model {model!r} is not registered: {known}.")


def _named(name: str, fields: Fields) -> dict[str, Any]:
    given = fields.get("name", name)
    if given != name:
        raise BadRequest(f"The name in the body, {given!r}, is not the one in the path, {name!r}.")
    return {**fields, "name": name}


def _same_version(held: DeploymentSpec, spec: DeploymentSpec) -> None:
    if (held.model, held.version) != (spec.model, spec.version):
        raise Conflict(
            f"Deployment {held.name!r} runs version {held.version} of model {held.model!r}, and that "
            f"cannot change: make another Deployment for version {spec.version} of {spec.model!r} "
            "and point the Endpoint to it (`deploy` does both)."
        )


def _changed(before: StoredDeployment, after: StoredDeployment) -> list[Change]:
    return [] if before == after else [PutDeployment(after, created=False)]


def _check_targets(snapshot: RegistrySnapshot, spec: EndpointSpec) -> None:
    for role, targets in (("targets", spec.targets), ("previous", spec.previous)):
        for name, times in Counter(target.deployment for target in targets).items():
            if times > 1:
                raise BadRequest(f"Endpoint {spec.name!r}: {role} names Deployment {name!r} twice.")
            if name not in snapshot.deployments:
                raise BadRequest(
                    f"Endpoint {spec.name!r}: {role} names Deployment {name!r}, which does not exist."
                )
    if not sum(target.weight for target in spec.targets):
        raise BadRequest(f"Endpoint {spec.name!r}: all weights are 0, so no target would get a request.")


def _once_each(stated: Sequence[tuple[str, Fields]]) -> None:
    for (kind, name), times in Counter((kind, str(each.get("name", ""))) for kind, each in stated).items():
        if not name:
            raise BadRequest(f"Each {kind} needs a name.")
        if times > 1:
            raise BadRequest(f"The {kind} {name!r} is stated {times} times.")


def _action(step: list[Change], known: bool) -> Literal["created", "updated", "unchanged"]:
    if not step:
        return "unchanged"
    return "updated" if known else "created"


def _listed(kind: str, found: Sequence[str]) -> str:
    return f"{kind}{'s' if len(found) > 1 else ''} {', '.join(repr(name) for name in found)}"

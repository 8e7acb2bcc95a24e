"""Deleting versions and models, with protection of what is in use."""

from __future__ import annotations

from services.registry.domain.desired_state import (
    Change,
    DropDeployment,
    DropEndpoint,
    DropVersion,
    PutEndpoint,
    RegistrySnapshot,
    named_by,
)
from tidegate.kernel.errors import Conflict, NotFound
from tidegate.kernel.protocol.models import EndpointSpec


def delete_version(snapshot: RegistrySnapshot, model: str, number: int) -> list[Change]:
    """Forget a version; Conflict while a Deployment runs it."""
    if (model, number) not in snapshot.versions:
        raise NotFound(f"Model {model!r} has no version {number}.")
    users = sorted(
        name
        for name, held in snapshot.deployments.items()
        if (held.spec.model, held.spec.version) == (model, number)
    )
    if users:
        raise Conflict(f"Version {number} of model {model!r} is in use by Deployment {_quoted(users)}.")
    return [DropVersion(model, number)]


def delete_model(snapshot: RegistrySnapshot, model: str, *, cascade: bool) -> list[Change]:
    """Forget every version of a model; with ``cascade`` also its Deployments and their Endpoints.

    Without it, Conflict while a Deployment runs any of them. An endpoint shared with another model
    keeps that model's targets.
    """
    numbers = snapshot.numbers(model)
    if not numbers:
        raise NotFound(f"There is no model {model!r}.")
    users = sorted(name for name, held in snapshot.deployments.items() if held.spec.model == model)
    if users and not cascade:
        raise Conflict(
            f"Model {model!r} is in use by Deployment {_quoted(users)}; "
            "cascade=true deletes them and their endpoints too."
        )
    gone = set(users)
    touched = [held.spec for held in snapshot.endpoints.values() if gone & set(named_by(held.spec))]
    changes: list[Change] = [_without(spec, gone) for spec in touched]
    changes += [DropDeployment(name) for name in users]
    changes += [DropVersion(model, number) for number in numbers]
    return changes


def _without(spec: EndpointSpec, gone: set[str]) -> Change:
    targets = [target for target in spec.targets if target.deployment not in gone]
    previous = [target for target in spec.previous if target.deployment not in gone]
    left = targets if sum(target.weight for target in targets) else previous
    if not left:
        return DropEndpoint(spec.name)
    rest = [target for target in previous if left is targets]
    return PutEndpoint(spec.model_copy(update={"targets": left, "previous": rest}), created=False)


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)

"""Delete versions and models that are not in use. Pure."""

from __future__ import annotations

from services.registry.domain import names
from services.registry.domain.desired_state import (
    Change,
    DropAlias,
    DropDeployment,
    DropEndpoint,
    DropVersion,
    PutEndpoint,
    RegistrySnapshot,
    deployments_in,
)
from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.models import EndpointSpec


def delete_version(snapshot: RegistrySnapshot, model: str, number: int) -> list[Change]:
    """Return the changes that delete a version. Raise Conflict while a Deployment runs it, or NotFound."""
    if (model, number) not in snapshot.versions:
        raise names.unknown_version(model, number)
    users = sorted(
        name
        for name, stored in snapshot.deployments.items()
        if (stored.spec.model, stored.spec.version) == (model, number)
    )
    if users:
        raise Conflict(
            f"Version {number} of model {model!r} is in use by Deployment {names.quoted(users)}. "
            "Delete the Deployment first."
        )
    named = sorted(alias for alias, each in snapshot.aliases_of(model).items() if each == number)
    if named:
        raise Conflict(
            f"Version {number} of model {model!r} has the alias {names.quoted(named)}. Move it first: "
            f"`tidegate alias set {model} {named[0]} N`, or `tidegate alias delete {model} {named[0]}`."
        )
    return [DropVersion(model, number)]


def delete_model(snapshot: RegistrySnapshot, model: str, *, cascade: bool) -> list[Change]:
    """Return the changes that delete all versions of a model.

    ``cascade`` also deletes its aliases, its Deployments and their Endpoints. Without it, raise Conflict
    while a version has an alias, or a Deployment runs a version. An Endpoint that also serves another model
    keeps the targets of that one.
    """
    numbers = snapshot.numbers(model)
    if not numbers:
        raise names.unknown("model", model)
    users = sorted(name for name, stored in snapshot.deployments.items() if stored.spec.model == model)
    if users and not cascade:
        raise Conflict(
            f"Model {model!r} is in use by Deployment {names.quoted(users)}. "
            "With cascade=true they and their Endpoints are deleted too."
        )
    named = sorted(snapshot.aliases_of(model))
    if named and not cascade:
        raise Conflict(
            f"Model {model!r} has the alias {names.quoted(named)}. With cascade=true its aliases are "
            "deleted too."
        )
    gone = set(users)
    touched = [
        stored.spec for stored in snapshot.endpoints.values() if gone & set(deployments_in(stored.spec))
    ]
    changes: list[Change] = [_without(spec, gone) for spec in touched]
    changes += [DropDeployment(name) for name in users]
    changes += [DropAlias(model, alias) for alias in named]
    changes += [DropVersion(model, number) for number in numbers]
    return changes


def _without(spec: EndpointSpec, gone: set[str]) -> Change:
    targets = [target for target in spec.targets if target.deployment not in gone]
    previous = [target for target in spec.previous if target.deployment not in gone]
    left = targets if sum(target.weight for target in targets) else previous
    if not left:
        return DropEndpoint(spec.name)
    rest = [target for target in previous if left is targets]
    rules = [rule for rule in spec.rules if rule.deployment not in gone]
    shadow = None if spec.shadow is not None and spec.shadow.deployment in gone else spec.shadow
    kept = {"targets": left, "previous": rest, "rules": rules, "shadow": shadow}
    return PutEndpoint(spec.model_copy(update=kept), created=False)

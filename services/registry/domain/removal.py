"""Plan the deletion and restoration of versions and models. Pure."""

from __future__ import annotations

from services.registry.domain import names
from services.registry.domain.desired_state import (
    Change,
    DropAlias,
    DropDeployment,
    DropEndpoint,
    DropVersion,
    MarkVersion,
    PutEndpoint,
    RegistrySnapshot,
    RestoreVersion,
    all_named_in,
)
from tidegate.kernel.errors import Conflict, NotFound
from tidegate.kernel.protocol.models import EndpointSpec


def delete_version(
    snapshot: RegistrySnapshot, model: str, number: int, *, permanent: bool = False
) -> list[Change]:
    """Return the changes that delete a version. If ``permanent``, the version cannot be restored.

    With ``permanent``, a version that is deleted already is removed permanently. Raise NotFound if the
    version does not exist. Raise Conflict if a Deployment runs the version, or if an alias points to it.
    """
    if permanent and (model, number) in snapshot.deleted:
        return [DropVersion(model, number)]
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
            f"Version {number} of model {model!r} has the alias {names.quoted(named)}. Move the alias "
            f"first: `tidegate alias set {model} {named[0]} N`, or `tidegate alias delete {model} "
            f"{named[0]}`."
        )
    return [_deleted(model, number, permanent=permanent)]


def restore(snapshot: RegistrySnapshot, model: str, number: int | None) -> list[Change]:
    """Return the changes that restore a deleted version; all deleted versions if ``number`` is None.

    Raise Conflict if the version exists and is not deleted. Raise NotFound if the model has no such deleted
    version.
    """
    gone = sorted(each for name, each in snapshot.deleted if name == model)
    if number is None and gone:
        return [RestoreVersion(model, each) for each in gone]
    if number in gone:
        return [RestoreVersion(model, number)]
    if number is not None and (model, number) in snapshot.versions:
        raise Conflict(f"Version {number} of model {model!r} is not deleted, so there is nothing to restore.")
    what = f"version {number} of model {model!r}" if number else f"version of model {model!r}"
    there = f" These can be restored: {', '.join(map(str, gone))}." if gone else ""
    raise NotFound(
        f"No deleted {what} can be restored. Deleted versions are removed permanently after "
        f"TIDEGATE_DELETED_VERSION_S seconds.{there}"
    )


def delete_model(
    snapshot: RegistrySnapshot, model: str, *, cascade: bool, permanent: bool = False
) -> list[Change]:
    """Return the changes that delete all versions of a model.

    ``permanent``: none of the versions can be restored, including those that were deleted before. With
    ``cascade``, the model's aliases, its Deployments and the Endpoints of these Deployments are deleted too.
    An Endpoint that also serves another model is not deleted: it only stops using the deleted Deployments.
    Without ``cascade``, raise Conflict if the model has an alias or a Deployment.
    """
    numbers = snapshot.numbers(model)
    gone_before = sorted(each for name, each in snapshot.deleted if name == model) if permanent else []
    if not numbers and not gone_before:
        raise names.unknown("model", model)
    users = sorted(name for name, stored in snapshot.deployments.items() if stored.spec.model == model)
    if users and not cascade:
        raise Conflict(
            f"Model {model!r} is in use by Deployment {names.quoted(users)}. To delete these Deployments "
            "and their Endpoints too, use cascade=true."
        )
    named = sorted(snapshot.aliases_of(model))
    if named and not cascade:
        raise Conflict(
            f"Model {model!r} has the alias {names.quoted(named)}. To delete the aliases too, use "
            "cascade=true."
        )
    gone = set(users)
    touched = [stored.spec for stored in snapshot.endpoints.values() if gone & set(all_named_in(stored.spec))]
    changes: list[Change] = [_without(spec, gone) for spec in touched]
    changes += [DropDeployment(name) for name in users]
    changes += [DropAlias(model, alias) for alias in named]
    changes += [_deleted(model, number, permanent=permanent) for number in numbers]
    changes += [DropVersion(model, number) for number in gone_before]
    return changes


def _deleted(model: str, number: int, *, permanent: bool) -> Change:
    return DropVersion(model, number) if permanent else MarkVersion(model, number)


def _without(spec: EndpointSpec, gone: set[str]) -> Change:
    targets = [target for target in spec.targets if target.deployment not in gone]
    previous = [target for target in spec.previous if target.deployment not in gone]
    left = targets if sum(target.weight for target in targets) else previous
    if not left:
        return DropEndpoint(spec.name)
    rest = [target for target in previous if left is targets]
    rules = [rule for rule in spec.rules if rule.deployment not in gone]
    shadow = None if spec.shadow is not None and spec.shadow.deployment in gone else spec.shadow
    failover = [name for name in spec.failover if name not in gone]
    kept = {"targets": left, "previous": rest, "rules": rules, "shadow": shadow, "failover": failover}
    return PutEndpoint(spec.model_copy(update=kept), created=False)

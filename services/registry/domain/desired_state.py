"""A snapshot of the desired state for decisions, and the changes that decisions return. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from services.registry.domain import names
from services.registry.domain.model_policy import ModelPolicy
from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.models import DeploymentSpec, EndpointSpec, Override, Target
from tidegate.kernel.protocol.verification import Verification

Kind = Literal["version", "alias", "policy", "deployment", "endpoint", "key", "artifact"]
Action = Literal["created", "updated", "deleted", "restored"]


@dataclass(frozen=True, slots=True)
class StoredDeployment:
    """A stored Deployment.

    ``declared``: True if a user created the Deployment by PUT or apply. Then its scaling settings do not
    change when an Endpoint begins or ends its use of the Deployment.
    """

    spec: DeploymentSpec
    declared: bool = False
    override: Override | None = None
    revision: int = 0


@dataclass(frozen=True, slots=True)
class StoredEndpoint:
    """A stored Endpoint."""

    spec: EndpointSpec
    revision: int = 0


@dataclass(frozen=True, slots=True)
class ChangeNotification:
    """A notification for other services that one object has changed."""

    kind: Kind
    name: str
    action: Action


@dataclass(frozen=True, slots=True)
class PutDeployment:
    """A change that creates or updates a Deployment."""

    stored: StoredDeployment
    created: bool


@dataclass(frozen=True, slots=True)
class PutEndpoint:
    """A change that creates or updates an Endpoint."""

    spec: EndpointSpec
    created: bool


@dataclass(frozen=True, slots=True)
class DropDeployment:
    """A change that deletes a Deployment."""

    name: str


@dataclass(frozen=True, slots=True)
class DropEndpoint:
    """A change that deletes an Endpoint."""

    name: str


@dataclass(frozen=True, slots=True)
class DropVersion:
    """A change that deletes a version of a model permanently."""

    model: str
    number: int


@dataclass(frozen=True, slots=True)
class MarkVersion:
    """A change that deletes a version of a model. The version can be restored until it is purged."""

    model: str
    number: int


@dataclass(frozen=True, slots=True)
class RestoreVersion:
    """A change that restores a deleted version of a model."""

    model: str
    number: int


@dataclass(frozen=True, slots=True)
class PutAlias:
    """A change that points an alias of a model to a version."""

    model: str
    alias: str
    number: int
    created: bool


@dataclass(frozen=True, slots=True)
class DropAlias:
    """A change that deletes an alias of a model."""

    model: str
    alias: str


@dataclass(frozen=True, slots=True)
class PutPolicy:
    """A change that sets the policy of a model."""

    model: str
    policy: ModelPolicy


Change = (
    PutDeployment
    | PutEndpoint
    | PutAlias
    | PutPolicy
    | RestoreVersion
    | DropDeployment
    | DropEndpoint
    | DropAlias
    | MarkVersion
    | DropVersion
)


def notification_of(change: Change) -> ChangeNotification:
    """Return the notification of a change."""
    match change:
        case PutDeployment(stored, created):
            return ChangeNotification("deployment", stored.spec.name, "created" if created else "updated")
        case PutEndpoint(spec, created):
            return ChangeNotification("endpoint", spec.name, "created" if created else "updated")
        case DropDeployment(name):
            return ChangeNotification("deployment", name, "deleted")
        case DropEndpoint(name):
            return ChangeNotification("endpoint", name, "deleted")
        case RestoreVersion(model, number):
            return ChangeNotification("version", f"{model}/{number}", "restored")
        case DropVersion(model, number) | MarkVersion(model, number):
            return ChangeNotification("version", f"{model}/{number}", "deleted")
        case PutAlias(model, alias, _, created):
            return ChangeNotification("alias", f"{model}/{alias}", "created" if created else "updated")
        case PutPolicy(model):
            return ChangeNotification("policy", model, "updated")
        case DropAlias(model, alias):
            return ChangeNotification("alias", f"{model}/{alias}", "deleted")


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """The part of the desired state that decisions need, at one revision.

    ``refused``: versions that must not serve, because their verification is pending or rejected.
    ``deleted``: deleted versions that can be restored. They are not in ``versions``.
    ``policies``: the policy of each model that has one. ``staged``: the stage of each version that has one.
    """

    versions: frozenset[tuple[str, int]]
    deployments: Mapping[str, StoredDeployment]
    endpoints: Mapping[str, StoredEndpoint]
    aliases: Mapping[tuple[str, str], int] = field(default_factory=dict)
    refused: Mapping[tuple[str, int], Verification] = field(default_factory=dict)
    deleted: frozenset[tuple[str, int]] = frozenset()
    policies: Mapping[str, ModelPolicy] = field(default_factory=dict)
    staged: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def aliases_of(self, model: str) -> dict[str, int]:
        """Return the aliases of a model, and the version of each."""
        return {alias: number for (name, alias), number in self.aliases.items() if name == model}

    def numbers(self, model: str) -> list[int]:
        """Return the version numbers of a model, ascending; empty for an unknown model."""
        return sorted(number for name, number in self.versions if name == model)

    def deployment(self, name: str) -> StoredDeployment:
        """Return a Deployment. Raise NotFound if it does not exist."""
        try:
            return self.deployments[name]
        except KeyError:
            raise names.unknown("Deployment", name) from None

    def endpoint(self, name: str) -> StoredEndpoint:
        """Return an Endpoint. Raise NotFound if it does not exist."""
        try:
            return self.endpoints[name]
        except KeyError:
            raise names.unknown("Endpoint", name) from None

    def heaviest(self, targets: Iterable[Target]) -> DeploymentSpec:
        """Return the Deployment of the target with the largest weight."""
        return self.deployments[max(targets, key=lambda target: target.weight).deployment].spec

    def with_version(self, model: str, number: int) -> RegistrySnapshot:
        """Return a copy of the snapshot with this version added."""
        return replace(self, versions=self.versions | {(model, number)})

    def in_use(self) -> set[str]:
        """Return the Deployments that at least one Endpoint names as target or shadow, or in a traffic rule.

        Previous targets of an Endpoint count as targets.
        """
        return {name for stored in self.endpoints.values() for name in deployments_in(stored.spec)}

    def failovers(self) -> set[str]:
        """Return the Deployments that at least one Endpoint names as failover."""
        return {name for stored in self.endpoints.values() for name in stored.spec.failover}

    def with_traffic(self) -> set[str]:
        """Return the Deployments that at least one Endpoint names as target or in a traffic rule.

        Previous targets of an Endpoint count as targets.
        """
        return {name for stored in self.endpoints.values() for name in targets_in(stored.spec)}

    def after(self, changes: Iterable[Change]) -> RegistrySnapshot:
        """Return a copy of the snapshot with these changes applied."""
        versions, deleted, deployments = set(self.versions), set(self.deleted), dict(self.deployments)
        endpoints, aliases, policies = dict(self.endpoints), dict(self.aliases), dict(self.policies)
        for change in changes:
            match change:
                case PutDeployment(stored):
                    deployments[stored.spec.name] = stored
                case PutEndpoint(spec):
                    endpoints[spec.name] = StoredEndpoint(spec)
                case DropDeployment(name):
                    del deployments[name]
                case DropEndpoint(name):
                    del endpoints[name]
                case DropVersion(model, number):
                    versions.discard((model, number))
                    deleted.discard((model, number))
                case MarkVersion(model, number):
                    versions.discard((model, number))
                    deleted.add((model, number))
                case RestoreVersion(model, number):
                    deleted.discard((model, number))
                    versions.add((model, number))
                case PutAlias(model, alias, number):
                    aliases[model, alias] = number
                case DropAlias(model, alias):
                    del aliases[model, alias]
                case PutPolicy(model, policy):
                    policies[model] = policy
        return replace(
            self,
            versions=frozenset(versions),
            deployments=deployments,
            endpoints=endpoints,
            aliases=aliases,
            deleted=frozenset(deleted),
            policies=policies,
        )


def deployments_in(spec: EndpointSpec) -> list[str]:
    """Return the Deployments that an Endpoint names as target, as shadow, or in a traffic rule.

    This includes the previous targets.
    """
    return targets_in(spec) + ([spec.shadow.deployment] if spec.shadow is not None else [])


def all_named_in(spec: EndpointSpec) -> list[str]:
    """Return all Deployments that an Endpoint names, also those that it names only as failover."""
    return deployments_in(spec) + spec.failover


def targets_in(spec: EndpointSpec) -> list[str]:
    """Return the Deployments that an Endpoint names as target, previous target or in a traffic rule."""
    targets = [target.deployment for target in [*spec.targets, *spec.previous]]
    return targets + [rule.deployment for rule in spec.rules]


def expect_revision(what: str, revision: int | None, expected: int | None) -> None:
    """Raise Conflict unless the object is at the expected revision. ``expected`` None: do not check."""
    if expected is None or revision == expected:
        return
    now = "does not exist" if revision is None else f"is at revision {revision}"
    raise Conflict(
        f"{what} {now}, but the request expected revision {expected}. Read the present state again and "
        "repeat the change."
    )

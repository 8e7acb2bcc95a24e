"""What the decisions look at and what they decide: a snapshot of the intention, and changes to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tidegate.kernel.errors import Conflict, NotFound
from tidegate.kernel.protocol.models import DeploymentSpec, EndpointSpec, Override

Kind = Literal["version", "deployment", "endpoint", "key"]
Action = Literal["created", "updated", "deleted"]


@dataclass(frozen=True, slots=True)
class StoredDeployment:
    """A stored Deployment. ``declared``: stated by a person (PUT, apply), so a roll-over leaves its scale."""

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
    """What happened to one object, as told to others."""

    kind: Kind
    name: str
    action: Action


@dataclass(frozen=True, slots=True)
class PutDeployment:
    """Store this Deployment, new or changed."""

    held: StoredDeployment
    created: bool

    @property
    def notification(self) -> ChangeNotification:
        """What to tell others."""
        return ChangeNotification("deployment", self.held.spec.name, "created" if self.created else "updated")


@dataclass(frozen=True, slots=True)
class PutEndpoint:
    """Store this Endpoint, new or changed."""

    spec: EndpointSpec
    created: bool

    @property
    def notification(self) -> ChangeNotification:
        """What to tell others."""
        return ChangeNotification("endpoint", self.spec.name, "created" if self.created else "updated")


@dataclass(frozen=True, slots=True)
class DropDeployment:
    """Forget this Deployment."""

    name: str

    @property
    def notification(self) -> ChangeNotification:
        """What to tell others."""
        return ChangeNotification("deployment", self.name, "deleted")


@dataclass(frozen=True, slots=True)
class DropEndpoint:
    """Forget this Endpoint."""

    name: str

    @property
    def notification(self) -> ChangeNotification:
        """What to tell others."""
        return ChangeNotification("endpoint", self.name, "deleted")


@dataclass(frozen=True, slots=True)
class DropVersion:
    """Forget this version of a model."""

    model: str
    number: int

    @property
    def notification(self) -> ChangeNotification:
        """What to tell others."""
        return ChangeNotification("version", f"{self.model}/{self.number}", "deleted")


Change = PutDeployment | PutEndpoint | DropDeployment | DropEndpoint | DropVersion


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """The whole intention at one revision, as far as decisions need it."""

    versions: frozenset[tuple[str, int]]
    deployments: Mapping[str, StoredDeployment]
    endpoints: Mapping[str, StoredEndpoint]

    def numbers(self, model: str) -> list[int]:
        """The version numbers of a model, ascending; empty when there is no such model."""
        return sorted(number for name, number in self.versions if name == model)

    def deployment(self, name: str) -> StoredDeployment:
        """The Deployment, or NotFound."""
        try:
            return self.deployments[name]
        except KeyError:
            raise NotFound(f"There is no Deployment {name!r}.") from None

    def endpoint(self, name: str) -> StoredEndpoint:
        """The Endpoint, or NotFound."""
        try:
            return self.endpoints[name]
        except KeyError:
            raise NotFound(f"There is no Endpoint {name!r}.") from None

    def with_version(self, model: str, number: int) -> RegistrySnapshot:
        """Return the snapshot with this version in it."""
        return replace(self, versions=self.versions | {(model, number)})

    def carrying(self) -> set[str]:
        """Deployments that some endpoint sends traffic to, or may go back to."""
        return {name for held in self.endpoints.values() for name in named_by(held.spec)}

    def after(self, changes: Iterable[Change]) -> RegistrySnapshot:
        """The snapshot as these changes would leave it."""
        versions, deployments = set(self.versions), dict(self.deployments)
        endpoints = dict(self.endpoints)
        for change in changes:
            match change:
                case PutDeployment(held):
                    deployments[held.spec.name] = held
                case PutEndpoint(spec):
                    endpoints[spec.name] = StoredEndpoint(spec)
                case DropDeployment(name):
                    del deployments[name]
                case DropEndpoint(name):
                    del endpoints[name]
                case DropVersion(model, number):
                    versions.discard((model, number))
        return replace(self, versions=frozenset(versions), deployments=deployments, endpoints=endpoints)


def named_by(spec: EndpointSpec) -> list[str]:
    """Deployments that an endpoint names, as target or as previous."""
    return [target.deployment for target in [*spec.targets, *spec.previous]]


def expect_revision(what: str, held: int | None, expected: int | None) -> None:
    """Raise Conflict unless the object is still the one that the caller has read (``If-Match``)."""
    if expected is None or held == expected:
        return
    now = "is not there" if held is None else f"is at revision {held}"
    raise Conflict(f"{what} {now}, not at revision {expected}: read it again and repeat the change.")

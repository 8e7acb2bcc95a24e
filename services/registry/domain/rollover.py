"""How a new version takes over an endpoint without a gap, and how the old one goes to sleep.

`deploy` makes a Deployment for the version and points the endpoint to it; what served until then
stays as ``previous``. The router moves traffic when a target is ready and then settles the endpoint;
settling puts the old Deployment to sleep, from where a call to its version still wakes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from services.registry.domain import merge, names
from services.registry.domain.desired_state import (
    Change,
    PutDeployment,
    PutEndpoint,
    RegistrySnapshot,
    StoredDeployment,
    StoredEndpoint,
    expect_revision,
    named_by,
)
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.models import DeploymentSpec, EndpointSpec, Target

RETIRED_SLEEPS_AFTER_S = 30.0
_SCALE = ("min_replicas", "max_replicas", "scale_to_zero_after_s", "scaling")


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """A wish to serve a version. ``version`` None: the latest. ``endpoint`` None: called like the model.

    ``traffic`` False: the Deployment is made, and the Endpoint stays as it is.
    """

    model: str
    version: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    endpoint: str | None = None
    traffic: bool = True


@dataclass(frozen=True, slots=True)
class DeployPlan:
    """The plan of one `deploy`."""

    changes: list[Change]
    deployment: str
    endpoint: str


def deploy(snapshot: RegistrySnapshot, order: DeployRequest) -> DeployPlan:
    """Serve a version under an endpoint; repeated with the same options it changes nothing."""
    version = _chosen(snapshot, order)
    options = dict(order.options)
    given = options.pop("name", None)
    name = names.of_deployment(order.model, version) if given is None else given
    names.check_new("Deployment", name, snapshot.deployments)
    endpoint_name = names.check_new("Endpoint", order.endpoint or order.model, snapshot.endpoints)
    endpoint = snapshot.endpoints.get(endpoint_name)
    fixed = {"name": name, "model": order.model, "version": version}
    for key in ("model", "version"):
        if options.pop(key, fixed[key]) != fixed[key]:
            raise BadRequest(f"The deployment's options name another {key} than the request itself.")
    changes = _deployment(snapshot, endpoint, fixed, options)
    if order.traffic:
        changes += _endpoint(snapshot.after(changes), endpoint, endpoint_name, name)
    return DeployPlan(changes, name, endpoint_name)


def settle(snapshot: RegistrySnapshot, name: str, seen: int | None) -> list[Change]:
    """A target of the endpoint is ready: what it replaced no longer serves and goes to sleep."""
    held = snapshot.endpoint(name)
    if not held.spec.previous:
        return []
    expect_revision(f"Endpoint {name!r}", held.revision, seen)
    return with_retired(snapshot, held.spec, held.spec.model_copy(update={"previous": []}))


def turned(held: EndpointSpec, wanted: EndpointSpec) -> EndpointSpec:
    """``wanted``, with whatever serves now as its ``previous``.

    While an earlier turn is not settled its targets may never have been ready, so what serves is that
    turn's ``previous``.
    """
    kept = {target.deployment for target in wanted.targets}
    serving = held.previous or held.targets
    return wanted.model_copy(update={"previous": [t for t in serving if t.deployment not in kept]})


def with_retired(snapshot: RegistrySnapshot, held: EndpointSpec, spec: EndpointSpec) -> list[Change]:
    """Store ``spec`` in place of ``held``; Deployments that nobody sends traffic to any more go to sleep.

    Those that a person declared keep the scale that was declared.
    """
    if spec == held:
        return []
    changes: list[Change] = [PutEndpoint(spec, created=False)]
    left = snapshot.after(changes)
    busy = left.carrying()
    for name in dict.fromkeys(named_by(held)):
        deployment = left.deployments[name]
        if name in busy or deployment.declared:
            continue
        asleep = asleep_spec(deployment.spec)
        if asleep != deployment.spec or deployment.override:
            changes.append(PutDeployment(replace(deployment, spec=asleep, override=None), created=False))
    return changes


def asleep_spec(spec: DeploymentSpec) -> DeploymentSpec:
    """The same Deployment, draining to zero but still there to be woken, and by nothing but a call."""
    scaling = spec.scaling.model_copy(update={"schedule": [], "forecast": "off"})
    asleep = {"min_replicas": 0, "scale_to_zero_after_s": RETIRED_SLEEPS_AFTER_S, "scaling": scaling}
    return spec.model_copy(update=asleep)


def scale_of(snapshot: RegistrySnapshot, endpoint: StoredEndpoint) -> dict[str, Any]:
    """Return the scale that an Endpoint's traffic needs now: that of its heaviest Deployment."""
    current = _heaviest(snapshot, endpoint)
    return {key: getattr(current, key) for key in _SCALE} if current is not None else {}


def _chosen(snapshot: RegistrySnapshot, order: DeployRequest) -> int:
    numbers = snapshot.numbers(order.model)
    if not numbers:
        raise NotFound(f"There is no model {order.model!r}: register a version of it first.")
    version = numbers[-1] if order.version is None else order.version
    if version not in numbers:
        there = ", ".join(map(str, numbers))
        raise NotFound(f"Model {order.model!r} has no version {version}; it has {there}.")
    return version


def _deployment(
    snapshot: RegistrySnapshot,
    endpoint: StoredEndpoint | None,
    fixed: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[Change]:
    """The Deployment of the version: new with what the endpoint's current one has, or changed."""
    name = fixed["name"]
    current = _heaviest(snapshot, endpoint)
    what = f"Deployment {name!r}"
    held = snapshot.deployments.get(name)
    if held is None:
        base = {**(current.model_dump() if current else {}), **fixed}
        return [
            PutDeployment(
                StoredDeployment(merge.deployment(base, options, what, exact_follows=True)), created=True
            )
        ]
    if (held.spec.model, held.spec.version) != (fixed["model"], fixed["version"]):
        raise Conflict(
            f"{what} exists and runs version {held.spec.version} of model {held.spec.model!r}: "
            "delete it, or give another name in the deployment's options."
        )
    base = held.spec.model_dump()
    if current is not None and name not in snapshot.carrying():
        # It comes back from its sleep, so it takes over the scale that is needed now.
        needed = current.model_dump()
        base |= {key: needed[key] for key in _SCALE}
    spec = merge.deployment(base, options, what, exact_follows=True)
    return [] if spec == held.spec else [PutDeployment(replace(held, spec=spec), created=False)]


def _heaviest(snapshot: RegistrySnapshot, endpoint: StoredEndpoint | None) -> DeploymentSpec | None:
    if endpoint is None:
        return None
    target = max(endpoint.spec.targets, key=lambda each: each.weight)
    return snapshot.deployments[target.deployment].spec


def _endpoint(
    snapshot: RegistrySnapshot, endpoint: StoredEndpoint | None, name: str, deployment: str
) -> list[Change]:
    if endpoint is None:
        return [PutEndpoint(EndpointSpec(name=name, targets=[Target(deployment=deployment)]), created=True)]
    if [target.deployment for target in endpoint.spec.targets] == [deployment]:
        return []
    wanted = endpoint.spec.model_copy(update={"targets": [Target(deployment=deployment)]})
    return with_retired(snapshot, endpoint.spec, turned(endpoint.spec, wanted))

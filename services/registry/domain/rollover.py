"""Plan the roll-over of an Endpoint to a new version without downtime. Pure.

`deploy` creates a Deployment for the version and makes it the Endpoint's target. The current targets become
``previous`` and still serve. When the new target is ready, the router moves the traffic and removes
``previous``. Then the old Deployment goes to sleep (zero replicas). A request for its version wakes it.
"""

from __future__ import annotations

import math
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
    all_named_in,
    expect_revision,
)
from tidegate.kernel.errors import BadRequest, Conflict, NotFound
from tidegate.kernel.protocol.models import DeploymentSpec, EndpointSpec, Rollout, Target

REPLACED_SLEEPS_AFTER_S = 30.0
_SCALE = ("min_replicas", "max_replicas", "scale_to_zero_after_s", "scaling")


@dataclass(frozen=True, slots=True)
class DeployRequest:
    """A request to serve a version. ``version`` None means the latest.

    ``endpoint`` None: the endpoint has the model's name. ``traffic`` False: create or change only the
    Deployment.
    """

    model: str
    version: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    endpoint: str | None = None
    traffic: bool = True


@dataclass(frozen=True, slots=True)
class DeployPlan:
    """The changes for a `deploy`, and the names of its Deployment and Endpoint."""

    changes: list[Change]
    deployment: str
    endpoint: str


def deploy(snapshot: RegistrySnapshot, request: DeployRequest) -> DeployPlan:
    """Plan the changes that make an Endpoint serve a version. A repeated request changes nothing.

    Raise NotFound for an unknown model or version, BadRequest or Conflict for invalid options.
    """
    version = _version_of(snapshot, request)
    options = dict(request.options)
    name = options.pop("name", None)
    if name is None:
        name = names.of_deployment(request.model, version)
    names.check_new("Deployment", name, snapshot.deployments)
    endpoint_name = names.check_new("Endpoint", request.endpoint or request.model, snapshot.endpoints)
    endpoint = snapshot.endpoints.get(endpoint_name)
    fixed = {"name": name, "model": request.model, "version": version}
    for key in ("model", "version"):
        if options.pop(key, fixed[key]) != fixed[key]:
            raise BadRequest(
                f"The {key} in the options of the Deployment differs from the {key} in the request. Remove "
                f"{key} from the options."
            )
    changes = _deployment(snapshot, endpoint, fixed, options)
    if request.traffic:
        changes += _endpoint(snapshot.after(changes), endpoint, endpoint_name, name)
    return DeployPlan(changes, name, endpoint_name)


def settle(snapshot: RegistrySnapshot, name: str, seen: int | None) -> list[Change]:
    """Plan the end of a roll-over: the replaced Deployments get no more traffic and go to sleep.

    Return no changes if the roll-over has ended already. Otherwise, raise Conflict if the Endpoint is no
    longer at revision ``seen``. ``seen`` None: the revision is not checked.
    """
    stored = snapshot.endpoint(name)
    if not stored.spec.previous:
        return []
    expect_revision(f"Endpoint {name!r}", stored.revision, seen)
    return replace_endpoint(snapshot, stored.spec, stored.spec.model_copy(update={"previous": []}))


def with_previous(stored: EndpointSpec, spec: EndpointSpec) -> EndpointSpec:
    """Return ``spec`` with ``previous`` set to the targets that serve now and are not in ``spec``.

    ``stored``: the Endpoint's present spec. During a roll-over, its ``previous`` targets serve, because its
    new targets may not be ready. Otherwise, its ``targets`` serve.
    """
    kept = {target.deployment for target in spec.targets}
    serving = stored.previous or stored.targets
    return spec.model_copy(update={"previous": [t for t in serving if t.deployment not in kept]})


def replace_endpoint(snapshot: RegistrySnapshot, stored: EndpointSpec, spec: EndpointSpec) -> list[Change]:
    """Plan to replace an Endpoint's spec. Deployments that the Endpoint no longer uses go to sleep.

    A Deployment keeps its scale if another Endpoint uses it, if it is a failover, or if a user declared it. A
    shadow ends if its Deployment gets traffic.
    """
    spec = without_own_shadow(spec)
    if spec == stored:
        return []
    changes: list[Change] = [PutEndpoint(spec, created=False)]
    ended = spec.rollout is None or not spec.rollout.active
    if stored.rollout is not None and stored.rollout.active and ended:
        changes += with_minimum(snapshot, stored.rollout, 100)
    after = snapshot.after(changes)
    in_use = after.in_use() | after.failovers()
    for name in dict.fromkeys(all_named_in(stored)):
        deployment = after.deployments.get(name)
        # In earlier releases, a failover could be deleted. So it may be missing.
        if deployment is None or name in in_use or deployment.declared:
            continue
        asleep = asleep_spec(deployment.spec)
        if asleep != deployment.spec or deployment.override:
            changes.append(PutDeployment(replace(deployment, spec=asleep, override=None), created=False))
    return changes


def without_own_shadow(spec: EndpointSpec) -> EndpointSpec:
    """Return the spec, without its shadow if the shadow's Deployment gets a share of the traffic."""
    weighted = {target.deployment for target in spec.targets if target.weight}
    if spec.shadow is None or spec.shadow.deployment not in weighted:
        return spec
    return spec.model_copy(update={"shadow": None})


def with_minimum(snapshot: RegistrySnapshot, rollout: Rollout, share: int) -> list[Change]:
    """Return the change that scales a canary's minimum number of replicas to ``share`` percent.

    ``rollout.min_replicas``: the minimum at 100 percent; None: the minimum does not change. The new minimum
    is rounded up. It grows with the share, so that the baseline and the canary together do not need twice the
    replicas.
    """
    stored = snapshot.deployments.get(rollout.deployment)
    if stored is None or rollout.min_replicas is None:
        return []
    spec = stored.spec.model_copy(update={"min_replicas": math.ceil(rollout.min_replicas * share / 100)})
    return [] if spec == stored.spec else [PutDeployment(replace(stored, spec=spec), created=False)]


def asleep_spec(spec: DeploymentSpec) -> DeploymentSpec:
    """Return the spec with the settings of a sleeping Deployment: zero replicas until a request arrives."""
    scaling = spec.scaling.model_copy(update={"schedule": [], "forecast": "off"})
    asleep = {"min_replicas": 0, "scale_to_zero_after_s": REPLACED_SLEEPS_AFTER_S, "scaling": scaling}
    return spec.model_copy(update=asleep)


def scale_of(snapshot: RegistrySnapshot, endpoint: StoredEndpoint) -> dict[str, Any]:
    """Return the scaling settings of the Endpoint's target with the largest weight."""
    current = snapshot.heaviest(endpoint.spec.targets)
    return {key: getattr(current, key) for key in _SCALE}


def _version_of(snapshot: RegistrySnapshot, request: DeployRequest) -> int:
    numbers = snapshot.numbers(request.model)
    if not numbers:
        raise NotFound(f"The model {request.model!r} does not exist. Register a version of it first.")
    version = numbers[-1] if request.version is None else request.version
    if version not in numbers:
        there = ", ".join(map(str, numbers))
        raise NotFound(f"Model {request.model!r} has no version {version}. Its versions: {there}.")
    return version


def _deployment(
    snapshot: RegistrySnapshot,
    endpoint: StoredEndpoint | None,
    fixed: Mapping[str, Any],
    options: Mapping[str, Any],
) -> list[Change]:
    """Plan to create or update the version's Deployment.

    A new Deployment copies the options of the Endpoint's current Deployment.
    """
    name = fixed["name"]
    current = snapshot.heaviest(endpoint.spec.targets) if endpoint is not None else None
    what = f"Deployment {name!r}"
    stored = snapshot.deployments.get(name)
    if stored is None:
        # Do not copy ``unverified``: a new version must be verified.
        base = {**(current.model_dump(exclude={"unverified"}) if current else {}), **fixed}
        return [
            PutDeployment(
                StoredDeployment(merge.deployment(base, options, what, exact_follows=True)), created=True
            )
        ]
    if (stored.spec.model, stored.spec.version) != (fixed["model"], fixed["version"]):
        raise Conflict(
            f"{what} exists and runs version {stored.spec.version} of model {stored.spec.model!r}. Delete "
            "that Deployment, or set another name in the options of the new one."
        )
    base = stored.spec.model_dump()
    if current is not None and name not in snapshot.with_traffic():
        # The Deployment has no traffic and may be asleep. So copy the scale of the Deployment that serves
        # now.
        needed = current.model_dump()
        base |= {key: needed[key] for key in _SCALE}
    spec = merge.deployment(base, options, what, exact_follows=True)
    return [] if spec == stored.spec else [PutDeployment(replace(stored, spec=spec), created=False)]


def _endpoint(
    snapshot: RegistrySnapshot, endpoint: StoredEndpoint | None, name: str, deployment: str
) -> list[Change]:
    if endpoint is None:
        return [PutEndpoint(EndpointSpec(name=name, targets=[Target(deployment=deployment)]), created=True)]
    if [target.deployment for target in endpoint.spec.targets] == [deployment]:
        return []
    rollout = endpoint.spec.rollout
    if rollout is not None and rollout.active:
        rollout = rollout.model_copy(update={"phase": "aborted", "reason": f"{deployment} was deployed"})
    changes: dict[str, Any] = {"targets": [Target(deployment=deployment)], "rollout": rollout}
    experiment = endpoint.spec.experiment
    if experiment is not None and experiment.active:
        aborted = {"phase": "aborted", "reason": f"{deployment} was deployed"}
        changes |= {
            "experiment": experiment.model_copy(update=aborted),
            "sticky": experiment.sticky_before,
        }
    spec = endpoint.spec.model_copy(update=changes)
    return replace_endpoint(snapshot, endpoint.spec, with_previous(endpoint.spec, spec))

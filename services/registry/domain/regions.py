"""Check that an Endpoint sends requests only to regions that it allows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from services.registry.domain.desired_state import Change, PutDeployment, PutEndpoint, RegistrySnapshot
from tidegate.kernel.errors import Conflict
from tidegate.kernel.protocol.models import DeploymentSpec, EndpointSpec


def check(after: RegistrySnapshot, changes: Sequence[Change]) -> None:
    """Raise Conflict if an Endpoint uses a Deployment outside the Endpoint's regions.

    ``after``: the snapshot after ``changes``. An Endpoint and a Deployment that it uses are checked only if
    ``changes`` creates or replaces one of the two.
    """
    endpoints = {change.spec.name for change in changes if isinstance(change, PutEndpoint)}
    deployments = {change.stored.spec.name for change in changes if isinstance(change, PutDeployment)}
    for name, stored in after.endpoints.items():
        used = [target.deployment for target in stored.spec.targets]
        used += [rule.deployment for rule in stored.spec.rules] + stored.spec.failover
        if stored.spec.shadow is not None:
            used.append(stored.spec.shadow.deployment)
        for each in used:
            found = after.deployments.get(each)
            if found is None or not (name in endpoints or each in deployments):
                continue
            if not stored.spec.may_use(found.spec):
                raise Conflict(_reason(stored.spec, found.spec))


def _reason(endpoint: EndpointSpec, deployment: DeploymentSpec) -> str:
    spec = deployment.upstream or deployment.llm
    region = spec.region if spec is not None else None
    where = f"processes requests in the region {region!r}" if region else "is an upstream without a region"
    rules = [
        f"{text} {', '.join(names)}"
        for text, names in (("allows", endpoint.allowed_regions), ("forbids", endpoint.forbidden_regions))
        if names
    ]
    return (
        f"Deployment {deployment.name!r} {where}, but Endpoint {endpoint.name!r} {' and '.join(rules)}. "
        "Choose another target, set the Deployment's region with `--region`, or change the Endpoint's "
        "regions."
    )

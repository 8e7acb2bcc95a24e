"""Replicas of a Deployment that are reserved for one endpoint.

They form a Deployment of their own, the *reserve*. It has the same version and options as the shared
Deployment, a fixed number of replicas, and its own queue. The registry does not store a reserve. Router and
autoscaler add it to the desired state that they read.
"""

from __future__ import annotations

from tidegate.kernel.protocol.models import Deployment, DesiredState, EndpointSpec
from tidegate.kernel.protocol.names import LONGEST


def reserve_of(deployment: str, endpoint: str) -> str:
    """Return the name of the Deployment with the replicas that are reserved for an endpoint."""
    return f"{deployment}-for-{endpoint}"


def fits(deployment: str, endpoint: str) -> bool:
    """Return True if the name from :func:`reserve_of` is short enough for a Deployment."""
    return len(reserve_of(deployment, endpoint)) <= LONGEST


def reserved_targets(endpoint: EndpointSpec) -> list[str]:
    """Return the names of the shared Deployments to which the reserves of an endpoint belong.

    The list has the target with the largest weight in ``targets``. If ``previous`` is not empty, the list
    also has the target with the largest weight in ``previous``. If the endpoint reserves no replicas, the
    list is empty.
    """
    if not endpoint.reserved:
        return []
    largest = [
        max(targets, key=lambda target: target.weight).deployment
        for targets in (endpoint.targets, endpoint.previous)
        if targets
    ]
    return list(dict.fromkeys(largest))


def reserve_names(desired: DesiredState) -> frozenset[str]:
    """Return the names of all reserves. The replicas of a reserve serve only one endpoint."""
    return frozenset(
        reserve_of(name, each.name) for each in desired.endpoints for name in reserved_targets(each)
    )


def holders(desired: DesiredState) -> dict[str, str]:
    """Return, by the name of each reserve, the shared Deployment to which the reserve belongs.

    A reserve is a Deployment that has only an endpoint's reserved replicas. The cost of a reserve counts
    against the budgets of the shared Deployment.
    """
    known = {each.name: (each.model, each.version) for each in desired.deployments}
    found = {
        reserve_of(name, each.name): name for each in desired.endpoints for name in reserved_targets(each)
    }
    # A Deployment can have the name of a reserve by chance. So only a Deployment with the same model and
    # version counts as the reserve.
    return {own: name for own, name in found.items() if own in known and known[own] == known.get(name)}


def with_reserves(desired: DesiredState) -> DesiredState:
    """Return the desired state, with a Deployment added for each set of reserved replicas."""
    known = {each.name: each for each in desired.deployments}
    reserves = [
        _reserve(known[name], reserve_of(name, endpoint.name), endpoint.reserved)
        for endpoint in desired.endpoints
        for name in reserved_targets(endpoint)
        if name in known and reserve_of(name, endpoint.name) not in known and fits(name, endpoint.name)
    ]
    if not reserves:
        return desired
    return desired.model_copy(update={"deployments": [*desired.deployments, *reserves]})


def _reserve(shared: Deployment, name: str, count: int) -> Deployment:
    paused = shared.override is not None and shared.override.replicas == 0
    # The copy gets no schedule, because a schedule would change the fixed number of replicas.
    scaling = shared.scaling.model_copy(update={"schedule": []})
    fixed = {"min_replicas": count, "max_replicas": count, "scale_to_zero_after_s": None, "scaling": scaling}
    return shared.model_copy(update={"name": name, "override": shared.override if paused else None, **fixed})

"""Choose another Deployment for a request whose engine cannot work now. Pure."""

from __future__ import annotations

from collections.abc import Collection

from services.gateway.domain.routing import DeploymentRoute, EndpointRoute

# The engine or upstream cannot work now. A 429 is not among these: the caller gets the provider's limit.
FAILED = frozenset({502, 503, 504})


def other_target(
    endpoint: EndpointRoute, failed: Collection[str], status: int, adapter: str
) -> DeploymentRoute | None:
    """Return a ready target or failover of the endpoint that has not failed; None: the failure stays.

    ``status``: the status of the failure, before the first event. ``failed``: the Deployments that failed.
    """
    if status not in FAILED:
        return None
    for route in (*endpoint.targets, *endpoint.failover):
        usable = route.llm is not None and (not adapter or adapter in route.llm.adapters)
        if usable and route.ready and route.name not in failed:
            return route
    return None

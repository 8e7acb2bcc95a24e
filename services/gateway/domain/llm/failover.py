"""Choose another Deployment for a request whose engine cannot work now. Pure."""

from __future__ import annotations

from collections.abc import Collection

from services.gateway.domain.routing import DeploymentRoute, EndpointRoute

# The statuses of an engine or upstream that cannot work now. 429 is not among them, because it is passed to
# the caller.
FAILED = frozenset({502, 503, 504})


def other_target(
    endpoint: EndpointRoute, failed: Collection[str], status: int, adapter: str
) -> DeploymentRoute | None:
    """Return a ready Deployment of the endpoint that has not failed; None if the caller must get the failure.

    ``status``: the HTTP status of the failure. ``failed``: the names of Deployments that failed.
    """
    if status not in FAILED:
        return None
    for route in (*endpoint.targets, *endpoint.failover):
        usable = route.llm is not None and (not adapter or adapter in route.llm.adapters)
        if usable and route.ready and route.name not in failed:
            return route
    return None

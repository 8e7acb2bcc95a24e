"""Choose another Deployment for a request whose engine cannot work now. Pure."""

from __future__ import annotations

from collections.abc import Collection

from services.gateway.domain.routing import DeploymentRoute, EndpointRoute

# The HTTP statuses after which another Deployment gets the request.
FAILED = frozenset({502, 503, 504})
# The status of an upstream whose limits are reached. That is no failure, so the other targets keep the shares
# that the operator set. Only the endpoint's ``failover`` takes the excess.
LIMITED = 429


def other_target(
    endpoint: EndpointRoute, failed: Collection[str], status: int, adapter: str
) -> DeploymentRoute | None:
    """Return another Deployment for a failed request; None if the caller must get the failure.

    ``status``: the HTTP status of the failure. ``failed``: the names of the Deployments that have failed.
    ``adapter``: the LoRA adapter that the request names, or empty.
    """
    if status not in FAILED and status != LIMITED:
        return None
    targets = endpoint.targets if status in FAILED else ()
    for route in (*targets, *endpoint.failover):
        usable = route.llm is not None and (not adapter or adapter in route.llm.adapters)
        if usable and route.ready and route.name not in failed:
            return route
    return None

"""Choose another Deployment for a request whose engine cannot work now. Pure."""

from __future__ import annotations

from collections.abc import Collection

from services.gateway.domain.routing import DeploymentRoute, EndpointRoute

# An engine or an upstream that cannot work now. A 429 is the provider's honest answer, and passes.
FAILED = frozenset({502, 503, 504})


def other_target(
    endpoint: EndpointRoute, failed: Collection[str], status: int, adapter: str
) -> DeploymentRoute | None:
    """Return a ready target of the endpoint that has not failed; None: the failure is the answer.

    ``status``: that of the failure, before the first event. ``failed``: the Deployments that had one.
    """
    if status not in FAILED:
        return None
    for route in endpoint.targets:
        usable = route.llm is not None and (not adapter or adapter in route.llm.adapters)
        if usable and route.ready and route.name not in failed:
            return route
    return None

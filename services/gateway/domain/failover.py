"""Choose another Deployment for a request with tensors, if its own Deployment cannot answer now. Pure."""

from __future__ import annotations

from collections.abc import Collection

from services.gateway.domain.routing import DeploymentRoute, EndpointRoute
from tidegate.kernel.errors import ColdStart, NoCapacity, TidegateError, UpstreamUnavailable

# The errors after which a request may go to another Deployment. Overloaded is not among them, because the
# other Deployment would become overloaded too.
REASONS = (UpstreamUnavailable, NoCapacity, ColdStart)


def another(
    endpoint: EndpointRoute, route: DeploymentRoute, failed: Collection[str], error: TidegateError
) -> DeploymentRoute | None:
    """Return a ready Deployment that can replace ``route`` and is not in ``failed``, or None.

    The Deployment must accept the same tensors as ``route``. If an upstream failed, try the endpoint's
    targets first. Then try the Deployments in the endpoint's ``failover``, in their order.

    If replicas are missing (NoCapacity, ColdStart), try only ``failover``. The other targets are not tried
    here, because the router decides if they get the requests. It does this with the setting ``when_unready``.
    """
    if not isinstance(error, REASONS):
        return None
    targets = endpoint.targets if isinstance(error, UpstreamUnavailable) else ()
    for other in (*targets, *endpoint.failover):
        if other.ready and other.name not in failed and _takes_the_same(route, other):
            return other
    return None


def _takes_the_same(route: DeploymentRoute, other: DeploymentRoute) -> bool:
    mine, theirs = route.contract.signature, other.contract.signature
    if mine is None or theirs is None or other.decoupled:
        return False
    return (
        mine.inputs == theirs.inputs
        and mine.outputs == theirs.outputs
        and (mine.max_batch_size > 0) == (theirs.max_batch_size > 0)
    )

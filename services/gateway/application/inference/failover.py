"""Send a request with tensors to another Deployment of its endpoint if the chosen one cannot answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from prometheus_client import Counter

from services.gateway.domain.contract import Decoded
from services.gateway.domain.failover import another
from services.gateway.domain.fair_lane import FlowKey
from services.gateway.domain.routing import DeploymentRoute, EndpointRoute
from services.gateway.domain.traffic_split import Origin
from tidegate.kernel import telemetry
from tidegate.kernel.errors import TidegateError, UpstreamUnavailable

log = telemetry.logger(__name__)

FAILOVERS = Counter(
    "tidegate_gateway_failovers_total",
    "Requests that went to another Deployment, because the first one could not answer.",
    ["model", "deployment", "other"],
)


def elsewhere(
    endpoint: EndpointRoute,
    route: DeploymentRoute,
    failed: set[str],
    error: TidegateError,
    origin: Callable[[], Origin] | None,
) -> DeploymentRoute:
    """Return another Deployment for a request. Raise ``error`` if there is none.

    Also raise ``error`` if one of the endpoint's traffic rules applies to the request. Such a rule may keep
    data in one country, so the request must not go to another Deployment.
    """
    stays = bool(endpoint.rules) and origin is not None and endpoint.has_rule_for(origin())
    other = None if stays else another(endpoint, route, failed, error)
    if other is None:
        raise error
    FAILOVERS.labels(endpoint.name, route.name, other.name).inc()
    log.warning(
        "a request is sent to another Deployment",
        extra={"deployment": route.name, "other": other.name, "problem": error.message},
    )
    return other


class Sender(Protocol):
    """The part of the inference core that sends a request."""

    def admit(self, route: DeploymentRoute, timeout_ms: float, flow: FlowKey) -> None:
        """Raise an error if a request may not be queued."""

    def send(
        self,
        endpoint: EndpointRoute,
        route: DeploymentRoute,
        request: Decoded,
        timeout_ms: float,
        decode_s: float,
        trace: bytes,
        done: Callable[[Any], None],
        flow: FlowKey,
    ) -> bytes:
        """Queue an admitted request, and return its id."""


@dataclass(slots=True)
class Failover:
    """A request that can be sent again to another Deployment if its upstream is unavailable.

    ``ends_at``: the deadline in seconds on the monotonic clock.
    """

    core: Sender
    endpoint: EndpointRoute
    route: DeploymentRoute
    request: Decoded
    trace: bytes
    ends_at: float
    flow: FlowKey
    origin: Callable[[], Origin] | None
    done: Callable[[Any], None]
    failed: set[str] = field(default_factory=set)

    def on_outcome(self, outcome: Any) -> None:
        """Call ``done`` with the outcome, or send the request to another Deployment.

        The request is sent to another Deployment only if the upstream is unavailable, and only before the
        deadline.
        """
        left_ms = (self.ends_at - time.monotonic()) * 1e3
        if not isinstance(outcome, UpstreamUnavailable) or left_ms <= 0:
            self.done(outcome)
            return
        self.failed.add(self.route.name)
        try:
            other = elsewhere(self.endpoint, self.route, self.failed, outcome, self.origin)
            self.core.admit(other, left_ms, self.flow)
        except TidegateError:
            self.done(outcome)  # the first failure is more useful than the refusal of the second Deployment
            return
        self.route = other
        self.core.send(
            self.endpoint, other, self.request, left_ms, 0.0, self.trace, self.on_outcome, self.flow
        )

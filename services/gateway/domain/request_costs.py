"""Compute the cost of a request from its share of a replica's time and its tokens.

The rates come from the autoscaler. Amounts are whole nanos: a nano is a billionth of the currency.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.gateway.domain.routing import DeploymentRoute
from services.gateway.domain.usage_cost import compute_us
from tidegate.kernel.errors import TooMany
from tidegate.kernel.protocol.cost_facts import NANOS, CostFacts
from tidegate.kernel.protocol.envelope import Reply
from tidegate.kernel.protocol.prices import TokenPrice
from tidegate.kernel.protocol.usage import tokens

HEADER = b"x-tidegate-cost"
# The cost of a request is unknown until the endpoint's first answer. Until then, each request reserves a
# fixed amount in the budget of its key: the cost of this many µs of a replica's time.
FIRST_US = 1_000_000
# After each answer, the mean cost changes by WEIGHT * (cost of the answer - mean cost). The highest cost is
# compared with the worst-case cost of the answer. If the worst-case cost is lower, the highest cost falls by
# DECAY * (highest cost - worst-case cost).
WEIGHT, DECAY = 0.1, 0.01


class RequestCosts:
    """The rates of all Deployments, and the learned cost of a request at each endpoint."""

    def __init__(self) -> None:
        self._facts = CostFacts()
        self._most: dict[str, float] = {}
        self._mean: dict[str, float] = {}
        # The Deployments that accept no requests, because their budget is used up.
        self.refused: frozenset[str] = frozenset()

    def replace(self, facts: CostFacts) -> None:
        """Set the rates. A Deployment without a rate gets the highest rate of all Deployments."""
        self._facts = facts
        self.refused = frozenset(name for name, each in facts.deployments.items() if each.refused)

    def check_budget(self, deployment: str, now: float) -> None:
        """Raise TooMany if a Deployment's budget is used up. ``now``: seconds since the epoch."""
        found = self._facts.deployments[deployment] if deployment in self.refused else None
        if found is not None and now < found.until:
            raise TooMany(found.refused, reason="budget_exhausted", retry_after_s=found.until - now)

    def of(
        self,
        route: DeploymentRoute,
        compute_us: int,
        tokens_in: int = 0,
        tokens_out: int = 0,
        tokens_cached: int = 0,
    ) -> int:
        """Return the cost of an answer in nanos. ``tokens_cached`` are a part of ``tokens_in``."""
        nanos = self._rate(route.name) * compute_us
        price: TokenPrice | None = self._facts.tokens.get(route.model)
        if price is not None:
            nanos += price.cost(tokens_in, tokens_out, tokens_cached) * NANOS
        return round(nanos)

    def header(self, route: DeploymentRoute, reply: Reply, parameters: Mapping[str, Any]) -> bytes:
        """Return the value of ``X-Tidegate-Cost`` for an answer."""
        return self.text(self.of(route, compute_us(reply), *(tokens(parameters) if parameters else ())))

    def text(self, nanos: int) -> bytes:
        """Return an amount with its currency, such as ``0.000000055 USD``."""
        return b"%d.%09d %s" % (nanos // NANOS, nanos % NANOS, self._facts.currency.encode())

    def most(self, endpoint: str) -> int:
        """Return the cost to reserve for the next request of an endpoint, in nanos. It is at least 1."""
        known = self._most.get(endpoint)
        return max(1, round(self._dearest() * FIRST_US if known is None else known))

    def mean(self, endpoint: str) -> int:
        """Return the expected cost of a request of an endpoint, in nanos.

        Before the endpoint's first answer, return the cost that a request reserves, and not 0. Jobs do not
        update the mean. So with 0, all jobs would be free at an endpoint that gets only jobs.
        """
        known = self._mean.get(endpoint)
        return self.most(endpoint) if known is None else round(known)

    def learn(
        self, endpoint: str, route: DeploymentRoute, nanos: int, compute_us: int, whole_us: int
    ) -> None:
        """Update the learned mean and highest cost of an endpoint's requests with an answer.

        ``nanos``: the cost of the answer. ``compute_us``: the answer's share of the time of its model call,
        in µs. ``whole_us``: the time of the whole call, in µs. For the highest cost, the worst case is
        assumed: the call has only this request, and no other call runs in the replica.
        """
        found = self._facts.deployments.get(route.name)
        alone = found.alone if found is not None else 0.0
        most = max(nanos, nanos - self._rate(route.name) * compute_us + alone * max(whole_us, compute_us))
        known = self._most.get(endpoint, 0.0)
        self._most[endpoint] = most if most > known else known + DECAY * (most - known)
        mean = self._mean.get(endpoint, float(nanos))
        self._mean[endpoint] = mean + WEIGHT * (nanos - mean)

    def _rate(self, deployment: str) -> float:
        found = self._facts.deployments.get(deployment)
        return self._dearest() if found is None else found.nanos_per_us

    def _dearest(self) -> float:
        return max((each.nanos_per_us for each in self._facts.deployments.values()), default=0.0)

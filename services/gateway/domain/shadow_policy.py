"""Decide if a copy of a request may go to a shadow now: within limits, and only to idle replicas. Pure."""

from __future__ import annotations

from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute

# A copy waits in the gateway for an idle replica for up to this time, and as long in the broker's queue.
WAIT_S = 2.0
# The longest time for an answer to a copy.
ANSWER_S = 30.0
# The most bytes of a copied request and its answer. Larger ones would take the memory of many others.
LARGEST = 4 * 2**20
# The most bytes of all copies that wait, are in flight, or are compared, in each gateway process.
MEMORY = 64 * 2**20
# The most copies of a gateway process that wait for an idle replica.
WAITING = 256
# The most answers that a gateway process compares in a second, and their bytes.
COMPARED_PER_S = 200.0
COMPARED_BYTES_PER_S = 32 * 2**20

# Why a request was not copied.
OVER_RATE, TOO_LARGE, NO_MEMORY = "over max_per_s", "too large", "no memory"
NO_REPLICA, NO_IDLE_REPLICA, UNFIT = "no ready replica", "no idle replica", "unfit model"
NO_BROKER, BUSY_HOST = "no broker", "busy host"
# Why a copy was not answered.
NO_ANSWER, NOT_SENT = "no answer", "not sent"


def is_unfit(route: DeploymentRoute) -> bool:
    """Return True for a model that cannot answer copies of single requests with one answer each."""
    return route.decoupled or route.stateful or route.llm is not None


def is_host_busy(fleet: ReplicaFleet, most: float) -> bool:
    """Return True if a replica's host has no spare cores: more than the share ``most`` is busy."""
    return fleet.host_busy is not None and fleet.host_busy > most


def spare(fleet: ReplicaFleet, outstanding: int, gateways: int) -> int:
    """Return how many copies this gateway may have in flight to a Deployment.

    A request in flight, of this gateway (``outstanding``) or another one, takes a replica. The other replicas
    are idle. Each takes as many copies as it takes requests, and the gateways share them.
    """
    idle = fleet.ready - outstanding - fleet.elsewhere
    return max(1, int(idle * fleet.parallel / max(gateways, 1))) if idle > 0 else 0

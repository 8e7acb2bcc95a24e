"""Decide if a request's copy may go to a shadow now: within limits, and only to idle replicas. Pure."""

from __future__ import annotations

from services.gateway.domain.replica_fleet import ReplicaFleet
from services.gateway.domain.routing import DeploymentRoute

# A copy waits at most this many seconds in the gateway for an idle replica. Then it waits at most the same
# time in the queue.
WAIT_S = 2.0
# The longest wait for the answer to a copy.
ANSWER_S = 30.0
# A request is copied only if the request and its answer have at most this many bytes each. Larger copies
# would take too much memory.
LARGEST = 4 * 2**20
# The largest total size in bytes of all copies in a gateway process. Each copy counts with the answer to its
# request, which is kept for the comparison. A copy counts while it waits, is in flight, or is compared.
MEMORY = 64 * 2**20
# The largest number of copies in a gateway process that wait for an idle replica.
WAITING = 256
# The limits of what a gateway process compares in a second: the number of answers, and their bytes.
COMPARED_PER_S = 200.0
COMPARED_BYTES_PER_S = 32 * 2**20

# The reasons why a request was not copied.
OVER_RATE, TOO_LARGE, NO_MEMORY = "over max_per_s", "too large", "no memory"
NO_REPLICA, NO_IDLE_REPLICA, UNFIT = "no ready replica", "no idle replica", "unfit model"
NO_BROKER, BUSY_HOST = "no broker", "busy host"
# The reasons why a copy was not answered.
NO_ANSWER, NOT_SENT = "no answer", "not sent"


def is_unfit(route: DeploymentRoute) -> bool:
    """Return True for a model that gets no copies: one with streams or sequences, or a language model."""
    return route.decoupled or route.stateful or route.llm is not None


def is_host_busy(fleet: ReplicaFleet, most: float) -> bool:
    """Return True if a host of the Deployment is too busy for copies.

    ``most``: the largest share of busy cores (0 to 1) at which a host still gets copies.
    """
    return fleet.host_busy is not None and fleet.host_busy > most


def spare(fleet: ReplicaFleet, outstanding: int, gateways: int) -> int:
    """Return how many copies this gateway may have in flight to a Deployment.

    ``outstanding``: the number of this gateway's requests in flight. Copies go only to idle replicas. Each
    request in flight, from any gateway, makes one replica busy. The copies that the idle replicas can run at
    the same time are divided evenly among the gateways. Each gateway may send at least one copy if a replica
    is idle.
    """
    idle = fleet.ready - outstanding - fleet.elsewhere
    return max(1, int(idle * fleet.parallel / max(gateways, 1))) if idle > 0 else 0

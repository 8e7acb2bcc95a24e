"""May this request wait? Decided before it is queued, by the wait that it would have."""

from __future__ import annotations

from services.gateway.domain.replica_fleet import ReplicaFleet
from tidegate.kernel.errors import ColdStart, NoCapacity, Overloaded, TidegateError

# What a prediction leaves unsaid (the call itself, two hops, the reporting interval) gets this part of a
# request's time; so that what is admitted is also answered in time.
RESERVE = 0.2


def refusal(
    *, outstanding: int, max_queue: int, wakeable: bool, fleet: ReplicaFleet, timeout_ms: float, name: str
) -> TidegateError | None:
    """Why a request with ``timeout_ms`` left is not admitted behind ``outstanding`` others, or None.

    The predicted wait is outstanding x model time per request / ready workers (Little's law). What is
    not known admits: a sleeping model has to be woken by somebody.
    """
    if fleet.ready == 0 and (found := nobody_there(wakeable, fleet, timeout_ms, name)) is not None:
        return found
    wait_ms = predicted_wait_ms(outstanding, fleet)
    waiting = outstanding + fleet.elsewhere
    if waiting >= max_queue:
        return Overloaded(
            f"{name}: {waiting} requests wait already, the limit is {max_queue}",
            retry_after_s=(wait_ms or 1_000.0) / 1e3,
        )
    if wait_ms is not None and wait_ms > timeout_ms * (1 - RESERVE):
        return Overloaded(
            f"{name}: the predicted wait is {wait_ms:.0f} ms, the request has {timeout_ms:.0f} ms",
            retry_after_s=(wait_ms - timeout_ms * (1 - RESERVE)) / 1e3,
        )
    return None


def nobody_there(wakeable: bool, fleet: ReplicaFleet, timeout_ms: float, name: str) -> TidegateError | None:
    """Why nobody will answer a request with ``timeout_ms`` left to a model without a replica, or None."""
    if not wakeable:
        return NoCapacity(
            f"{name} has no replica and may not start one: it is held at 0 replicas (an operator lifts that "
            f"with `tidegate scale {name} --auto`)",
            retry_after_s=30.0,
        )
    if fleet.fault:
        return no_replica(fleet, name)
    if fleet.start_ms is not None and fleet.start_ms > timeout_ms:
        return ColdStart(
            f"{name} takes {fleet.start_ms:.0f} ms more to start, the request has {timeout_ms:.0f} ms: allow "
            "it more time, or come back after Retry-After",
            retry_after_s=fleet.start_ms / 1e3,
        )
    return None


def no_replica(fleet: ReplicaFleet, name: str) -> NoCapacity:
    """Return the error for a request to a Deployment whose replicas do not start."""
    return NoCapacity(f"{name} has no replica: {fleet.fault}", retry_after_s=30.0)


def not_ready(wakeable: bool, fleet: ReplicaFleet) -> str:
    """Return why a request would not be answered now; empty: a replica is ready, or the request wakes one."""
    if fleet.ready:
        return ""
    if not wakeable:
        return "it is held at 0 replicas"
    return fleet.fault or fleet.reloading


def predicted_wait_ms(outstanding: int, fleet: ReplicaFleet) -> float | None:
    """How long a new request waits for its turn, in ms; None when nothing was measured."""
    per_request = fleet.request_ms if fleet.full_ms is None else fleet.full_ms
    if fleet.ready == 0 or per_request is None:
        return None
    return (outstanding + fleet.elsewhere) * per_request / fleet.ready

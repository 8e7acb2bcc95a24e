"""If a request would wait too long, refuse it before it is queued."""

from __future__ import annotations

from typing import NamedTuple

from services.gateway.domain.fair_lane import Standing
from services.gateway.domain.replica_fleet import ReplicaFleet
from tidegate.kernel.errors import ColdStart, DeadlinePassed, NoCapacity, Overloaded, TidegateError

# This share of a request's remaining time is reserved for the model call, the transfer of the messages, and
# the delay of the replicas' reports. The predicted wait does not include these times.
RESERVE = 0.2


def refusal(
    *,
    outstanding: int,
    max_queue: int,
    wakeable: bool,
    fleet: ReplicaFleet,
    timeout_ms: float,
    name: str,
    standing: Standing | None = None,
) -> TidegateError | None:
    """Return the error for a request that may not be queued, or None if it may be queued.

    ``outstanding``: this gateway's requests in flight. ``timeout_ms``: the request's remaining time.
    ``standing``: the caller's requests and its fair share of the Deployment; None if no other caller has
    requests. With ``standing``, a full queue refuses only callers that have used up their share, and the
    predicted wait is computed from the caller's own requests and share.

    The predicted wait is requests in flight x model time per request / ready replicas (Little's law). While
    no model time is measured, no request is refused for its predicted wait, because the first requests must
    wake a model at 0 replicas.
    """
    if fleet.ready == 0 and (error := no_replica_in_time(wakeable, fleet, timeout_ms, name)) is not None:
        return error
    wait_ms = predicted_wait_ms(outstanding, fleet)
    waiting = outstanding + fleet.elsewhere
    if standing is not None:
        mine = standing.outstanding
        if wait_ms is not None and waiting:
            wait_ms = min(wait_ms, wait_ms * mine / (waiting * standing.share))
        if waiting >= max_queue and mine >= (own_limit := max(1, int(max_queue * standing.share))):
            return Overloaded(
                f"{name}: {mine} requests of this caller already wait. The caller's share of the queue is "
                f"{own_limit} of {max_queue}. Retry after the time in Retry-After, or ask the operator for "
                "a greater weight",
                retry_after_s=(wait_ms or 1_000.0) / 1e3,
            )
    elif waiting >= max_queue:
        return Overloaded(
            f"{name}: {waiting} requests already wait, and the limit is {max_queue}. Retry after the time in "
            "Retry-After",
            retry_after_s=(wait_ms or 1_000.0) / 1e3,
        )
    if wait_ms is not None and wait_ms > timeout_ms * (1 - RESERVE):
        return Overloaded(
            f"{name}: the predicted wait is {wait_ms:.0f} ms, but the request has {timeout_ms:.0f} ms left. "
            "Set a longer timeout, or retry after the time in Retry-After",
            retry_after_s=(wait_ms - timeout_ms * (1 - RESERVE)) / 1e3,
        )
    return None


def no_replica_in_time(
    wakeable: bool, fleet: ReplicaFleet, timeout_ms: float, name: str
) -> TidegateError | None:
    """Return the error if no replica can be ready within ``timeout_ms``, else None.

    The calling code must call this function only while no replica is ready.
    """
    if not wakeable:
        return NoCapacity(
            f"{name} has no replica and may not start one, because an operator holds it at 0 replicas. To "
            f"change that: `tidegate scale {name} --auto`",
            retry_after_s=30.0,
        )
    if fleet.fault:
        return no_replica(fleet, name)
    if fleet.start_ms is not None and fleet.start_ms > timeout_ms:
        return ColdStart(
            f"{name} needs {fleet.start_ms:.0f} ms more to start, but the request has {timeout_ms:.0f} ms "
            "left: set a longer timeout, or retry after the time in Retry-After",
            retry_after_s=fleet.start_ms / 1e3,
        )
    return None


def no_replica(fleet: ReplicaFleet, name: str) -> NoCapacity:
    """Return the error for a request to a Deployment whose replicas do not start."""
    return NoCapacity(f"{name} has no replica: {fleet.fault}", retry_after_s=30.0)


def too_late(
    name: str, fleet: ReplicaFleet, passed: str, *, waited_s: float, held: int | None
) -> TidegateError:
    """Return the error for a passed deadline. If no replica can start, the error says why.

    ``passed``: the message about the deadline. ``waited_s``: how long the request waited. ``held``: None if
    the request was published to the queue. Otherwise, it is the number of the caller's unanswered requests to
    the Deployment.

    A request that was not published has not run. If a replica is ready, the error for such a request is
    Overloaded. It tells the caller that a retry is safe.
    """
    if fleet.fault and not fleet.ready:
        return no_replica(fleet, name)
    if held is None or not fleet.ready:
        return DeadlinePassed(passed)
    return Overloaded(
        f"{name}: the request waited {waited_s:g} s and was not sent to a replica. More requests wait than "
        "the replicas can answer in this time. Send fewer requests at the same time, or set a longer "
        "timeout",
        retry_after_s=(predicted_wait_ms(held, fleet) or 1_000.0) / 1e3,
    )


class ModelState(NamedTuple):
    """A model's state in Triton's repository index. ``reason``: why it cannot answer now; empty if it can."""

    word: str
    reason: str = ""


READY = ModelState("READY")


def state(wakeable: bool, fleet: ReplicaFleet) -> ModelState:
    """Return a Deployment's state in Triton's index.

    It is READY if a replica is ready, or if a request would start one. It is LOADING while a replica restarts
    and no other one is ready. Otherwise it is UNAVAILABLE, with the reason.
    """
    if fleet.ready:
        return READY
    if not wakeable:
        return ModelState(
            "UNAVAILABLE",
            "unloaded: an operator holds the model at 0 replicas (`tidegate resume NAME` starts it)",
        )
    if fleet.fault:
        return ModelState("UNAVAILABLE", fleet.fault)
    return ModelState("LOADING", fleet.reloading) if fleet.reloading else READY


def predicted_wait_ms(outstanding: int, fleet: ReplicaFleet) -> float | None:
    """Return the predicted wait of a new request in ms.

    Return None if no replica is ready, or if the model's time per request was not measured yet.
    """
    per_request = fleet.request_ms if fleet.full_ms is None else fleet.full_ms
    if fleet.ready == 0 or per_request is None:
        return None
    return (outstanding + fleet.elsewhere) * per_request / fleet.ready

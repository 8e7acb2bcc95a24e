"""May this request wait? Decided before it is queued, by the wait that it would have."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.errors import NoCapacity, Overloaded, TidegateError


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers of a Deployment as last reported. ``request_ms``: model time per request; None: unknown."""

    ready: int = 0
    request_ms: float | None = None


UNKNOWN_FLEET = Fleet()


def refusal(
    *, outstanding: int, max_queue: int, wakeable: bool, fleet: Fleet, timeout_ms: float, name: str
) -> TidegateError | None:
    """Why a request with ``timeout_ms`` left is not admitted behind ``outstanding`` others, or None.

    The predicted wait is outstanding x model time per request / ready workers (Little's law). What is
    not known admits: a sleeping model has to be woken by somebody.
    """
    if fleet.ready == 0 and not wakeable:
        return NoCapacity(
            f"{name} has no replica and may not start one: it is held at 0 replicas", retry_after_s=30.0
        )
    wait_ms = predicted_wait_ms(outstanding, fleet)
    if outstanding >= max_queue:
        return Overloaded(
            f"{name}: {outstanding} requests wait already, the limit is {max_queue}",
            retry_after_s=(wait_ms or 1_000.0) / 1e3,
        )
    if wait_ms is not None and wait_ms > timeout_ms:
        return Overloaded(
            f"{name}: the predicted wait is {wait_ms:.0f} ms, the request has {timeout_ms:.0f} ms",
            retry_after_s=(wait_ms - timeout_ms) / 1e3,
        )
    return None


def predicted_wait_ms(outstanding: int, fleet: Fleet) -> float | None:
    """How long a new request waits for its turn, in ms; None when nothing was measured."""
    if fleet.ready == 0 or fleet.request_ms is None:
        return None
    return outstanding * fleet.request_ms / fleet.ready

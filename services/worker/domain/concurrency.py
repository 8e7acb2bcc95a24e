"""Decide how many model calls a worker has open at once."""

from __future__ import annotations

LIGHT_CALL_MS = 5.0
LIGHT_CALLS = 8
AHEAD_CALL_MS = 100.0


def calls_in_flight(*, instances: int, batches: bool, call_ms: float | None) -> int:
    """Model calls to have open at once.

    A model that batches gets one call for each instance: more calls only made smaller batches. Without
    batching, light calls overlap to hide the way to Triton and back; heavy ones do not, since what waits
    inside Triton is lost to other replicas.
    """
    if batches:
        return instances
    if call_ms is not None and call_ms < LIGHT_CALL_MS:
        return instances + LIGHT_CALLS
    return instances + 1


def effective_concurrency(
    *,
    instances: int,
    batch: int,
    call_rows: float | None,
    call_requests: float | None,
    open_calls: float | None,
    max_concurrency: int | None,
) -> float:
    """Requests that share the duration of one call when the model has all it can take.

    ``batch``: rows of a call, 0 without a batch axis; the others are recent means, None before anything was
    measured: rows and requests in a call, calls that were open while one was. Without a batch axis a call has
    one request, and its duration holds the wait inside Triton for the calls that are open beside it: by
    Little's law so many requests end in that time.
    """
    if batch:
        rows = max((call_rows or 1.0) / max(call_requests or 1.0, 1.0), 1.0)
        together = float(instances * max(1, int(batch / rows)))
    else:
        together = max(float(instances), open_calls or 1.0)
    return min(together, max_concurrency or together)


def job_calls(in_flight: int) -> int:
    """Calls of jobs to have open at once: one place is kept for who waits for an answer, if there are two."""
    return max(1, in_flight - 1)


def jobs_ahead(calls: int, call_ms: float | None) -> int:
    """Groups of jobs to prepare while ``calls`` run: as many when calls are short, so that the model does
    not wait for the store; none when they are long, so that a job begins when it is said to.
    """
    return calls if call_ms is not None and call_ms < AHEAD_CALL_MS else 0

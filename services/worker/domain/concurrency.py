"""Decide how many model calls a worker has open at once."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.protocol.models import Deployment, Signature

# Calls shorter than this overlap, LIGHT_CALLS of them, if the model has no batch axis.
LIGHT_CALL_MS = 5.0
LIGHT_CALLS = 8
# Jobs for the next calls are prepared only while calls are shorter than this.
AHEAD_CALL_MS = 100.0
# How many streams a decoupled model has at once if its Deployment sets no ``max_concurrency``.
DEFAULT_STREAMS = 16


@dataclass(frozen=True, slots=True)
class CallLimits:
    """What a loaded model and its Deployment allow for calls.

    ``max_rows``: rows of one call; 0: the model has no batch axis. ``window_s``: how long a call waits for a
    full batch. ``max_concurrency``: requests in calls at once; None: no limit. ``streams``: streams at once;
    0: the model is not decoupled.
    """

    max_rows: int
    instances: int = 1
    window_s: float = 0.0
    max_concurrency: int | None = None
    streams: int = 0


def call_limits(deployment: Deployment, signature: Signature, instances: int) -> CallLimits:
    """Return the limits of a loaded model; ``instances`` is how many of them its Triton runs."""
    max_concurrency = deployment.max_concurrency
    row_limits = (signature.max_batch_size, deployment.batching.max_batch, max_concurrency)
    return CallLimits(
        max_rows=min(limit for limit in row_limits if limit is not None),
        instances=instances,
        window_s=deployment.batching.window_ms / 1e3,
        max_concurrency=max_concurrency,
        streams=(max_concurrency or DEFAULT_STREAMS) if signature.decoupled else 0,
    )


def calls_in_flight(*, instances: int, batches: bool, call_ms: float | None) -> int:
    """Return how many model calls to have open at once.

    A model that batches gets one call for each instance: more calls would only make smaller batches. Without
    batching, light calls overlap to hide the way to Triton and back. Heavy calls do not, since requests that
    wait inside Triton are lost to other replicas.
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
    """Return how many requests share the duration of one call when the model is fully loaded.

    ``batch``: rows of a call, 0 without a batch axis. The other values are recent means, None before anything
    was measured: rows and requests in a call, and calls that were open while one was. Without a batch axis a
    call has one request, and its duration includes the wait inside Triton for the calls beside it. By
    Little's law as many requests end in that time.
    """
    if batch:
        rows = max((call_rows or 1.0) / max(call_requests or 1.0, 1.0), 1.0)
        concurrency = float(instances * max(1, int(batch / rows)))
    else:
        concurrency = max(float(instances), open_calls or 1.0)
    return min(concurrency, max_concurrency or concurrency)


def job_calls(max_calls: int) -> int:
    """Return how many calls of jobs to have open at once: of two or more, one is kept for requests."""
    return max(1, max_calls - 1)


def jobs_ahead(calls: int, call_ms: float | None) -> int:
    """Return how many groups of jobs to prepare while ``calls`` run.

    If calls are short, as many, so that the model does not wait for the store. If they are long, none: a job
    would be recorded as running long before it starts.
    """
    return calls if call_ms is not None and call_ms < AHEAD_CALL_MS else 0

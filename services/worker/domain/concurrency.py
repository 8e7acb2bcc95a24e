"""Decide how many model calls a worker may have open at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.kernel.protocol import llm
from tidegate.kernel.protocol.models import LARGEST, Deployment, LlmSpec, Signature

# A call of a model without a batch axis is light if it takes fewer milliseconds than this. If calls are
# light, the worker may have LIGHT_CALLS more open calls than the model has instances.
LIGHT_CALL_MS = 5.0
LIGHT_CALLS = 8
# While several callers share the model, LIGHT_CALLS applies only to calls that take fewer milliseconds than
# this.
SHORTEST_CALL_MS = 1.0
# If calls take fewer milliseconds than this, the jobs of the next calls are prepared while other calls run.
AHEAD_CALL_MS = 100.0
# If a Deployment sets no ``max_concurrency``, its decoupled model runs at most this many streams at the same
# time.
DEFAULT_STREAMS = 16


@dataclass(frozen=True, slots=True)
class CallLimits:
    """The limits that a loaded model and its Deployment set for calls.

    ``max_rows``: the most rows of one call; 0: the model has no batch axis.
    ``instances``: the number of the model's instances in Triton.
    ``window_s``: the longest time that a call waits for a full batch.
    ``max_concurrency``: the most requests that are in calls at the same time; None means no limit.
    ``streams``: the most streams that run at the same time; 0: the model is not decoupled.
    """

    max_rows: int
    instances: int = 1
    window_s: float = 0.0
    max_concurrency: int | None = None
    streams: int = 0


def call_limits(deployment: Deployment, signature: Signature, instances: int) -> CallLimits:
    """Return the limits of a loaded model. ``instances``: the number of its instances in Triton."""
    max_concurrency = deployment.max_concurrency
    streams = max_concurrency or DEFAULT_STREAMS
    if signature == llm.SIGNATURE:
        streams = min(deployment.max_concurrency or LARGEST, (deployment.llm or LlmSpec()).slots)
    row_limits = (signature.max_batch_size, deployment.batching.max_batch, max_concurrency)
    return CallLimits(
        max_rows=min(limit for limit in row_limits if limit is not None),
        instances=instances,
        window_s=deployment.batching.window_ms / 1e3,
        max_concurrency=max_concurrency,
        streams=streams if signature.decoupled else 0,
    )


def calls_in_flight(*, instances: int, batches: bool, call_ms: float | None, shared: bool = False) -> int:
    """Return the maximum number of open calls of the model.

    A model that batches gets one call per instance, because more calls would only make the batches smaller. A
    model that does not batch gets more calls than it has instances. So Triton already has the next request
    when a call ends. If calls are long, the model gets only one more call than instances, because a request
    that is already in Triton cannot move to another replica.

    ``shared``: True if several callers send requests. Then fewer calls may be open, because each open call
    delays the requests of the other callers.
    """
    if batches:
        return instances
    if shared and (call_ms is None or call_ms >= SHORTEST_CALL_MS):
        return instances + (call_ms is not None and call_ms < LIGHT_CALL_MS)
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
    """Return how many requests a replica completes in the time of one call, under full load.

    ``batch``: the maximum number of rows in a call; 0 means no batch axis. ``call_rows``: the mean number of
    rows in a call. ``call_requests``: the mean number of requests in a call. ``open_calls``: the mean number
    of open calls. These means are of recent calls. Each is None before the first measurement.

    Without a batch axis, a call has one request, and its duration includes its wait in Triton. The mean
    number of requests that end in this duration is equal to the mean number of open calls (Little's law).
    """
    if batch:
        rows = max((call_rows or 1.0) / max(call_requests or 1.0, 1.0), 1.0)
        concurrency = float(instances * max(1, int(batch / rows)))
    else:
        concurrency = max(float(instances), open_calls or 1.0)
    return min(concurrency, max_concurrency or concurrency)


def job_calls(max_calls: int) -> int:
    """Return how many of the ``max_calls`` open calls may run jobs.

    If ``max_calls`` is two or more, one call is reserved for requests.
    """
    return max(1, max_calls - 1)


def jobs_ahead(calls: int, call_ms: float | None) -> int:
    """Return how many groups of jobs to prepare for the next calls, while ``calls`` calls run.

    If calls are short, return ``calls``, so that the model does not wait for the store between two calls. If
    calls are long, return 0, because a prepared job would be recorded as running long before its call starts.
    """
    return calls if call_ms is not None and call_ms < AHEAD_CALL_MS else 0

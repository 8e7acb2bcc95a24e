"""Decide how many messages a worker holds unacked: the prefetch of its consumers."""

from __future__ import annotations

import math

# How long the calls for a worker's unacked messages should take, in milliseconds.
IN_HAND_MS = 50.0
MAX_PREFETCH = 256
UNKNOWN_PREFETCH = 2


def prefetch(
    *,
    call_ms: float | None,
    batch_mean: float | None,
    frames_per_message: float,
    max_calls: int,
    awaited_batch: int = 0,
    max_batch: int = 0,
) -> int:
    """Return how many messages of requests to hold: about ``IN_HAND_MS`` of expected work.

    A fixed number would be too small for quick models. For slow models it would be too large: a few workers
    would hold all messages, and new workers would get none.

    The result is at least ``max_calls`` + 1, and enough for the ``awaited_batch`` requests that a call waits
    for. It also allows full batches (``max_batch`` requests each) in the next calls. Otherwise the batches of
    a slow model would never have more than two requests.
    """
    least = max(max_calls + 1, min(math.ceil(awaited_batch / max(frames_per_message, 1.0)), MAX_PREFETCH))
    if call_ms is None or call_ms <= 0:
        return max(UNKNOWN_PREFETCH, least)
    least = max(least, math.ceil((max_calls + 1) * max_batch / max(frames_per_message, 1.0)))
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    messages = math.ceil(IN_HAND_MS / (request_ms * max(frames_per_message, 1.0)))
    return min(max(messages, least), MAX_PREFETCH)


def consumer_prefetch(messages: int) -> int:
    """Return the prefetch of a consumer that should hold ``messages``: a quarter more, but at least one more.

    Gateways publish only as many requests as the workers should hold. There is one exception: if a caller is
    below its fair share, its request is published immediately. The margin is for such requests. The broker
    delivers them immediately, and the worker can run them before the requests that it already holds.
    """
    return messages + max(1, messages // 4)


def without_margin(prefetch: int) -> int:
    """Return how many messages a consumer with this prefetch should hold: all but the margin."""
    return max(1, prefetch - max(1, prefetch // 5))


def job_prefetch(*, call_ms: float | None, batch_mean: float | None, calls: int, max_batch: int) -> int:
    """Return how many jobs of a level to hold: enough for the open calls and for one more call.

    Without jobs for the additional call, a level would have no job ready when the next call is chosen. If
    calls are long, a worker holds no more than this, because another replica could run the jobs. If calls are
    short, it holds twice the work of requests, because a job also needs two round trips to the store.
    """
    least = (calls + 1) * max(max_batch, 1)
    if call_ms is None or call_ms <= 0:
        return min(least, MAX_PREFETCH)
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    return min(max(math.ceil(2 * IN_HAND_MS / request_ms), least), MAX_PREFETCH)


def worth_changing(current: int, desired: int) -> bool:
    """Return True if a prefetch should change so much that a new consumer is worth its cost."""
    return desired >= current * 1.5 or desired <= current / 1.5

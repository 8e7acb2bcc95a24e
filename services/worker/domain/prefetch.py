"""Decide how many messages a worker holds unacked: the prefetch of its consumers."""

from __future__ import annotations

import math

# How much expected work to hold.
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

    A fixed count would starve late workers on heavy models and leave workers idle on light ones. The result
    is at least one more than ``max_calls``, and enough for the ``awaited_batch`` that a call waits for. While
    calls run, the next ones (``max_batch`` requests each) must be able to gather. Otherwise a slow model that
    batches would never see more than two requests.
    """
    least = max(max_calls + 1, min(math.ceil(awaited_batch / max(frames_per_message, 1.0)), MAX_PREFETCH))
    if call_ms is None or call_ms <= 0:
        return max(UNKNOWN_PREFETCH, least)
    least = max(least, math.ceil((max_calls + 1) * max_batch / max(frames_per_message, 1.0)))
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    messages = math.ceil(IN_HAND_MS / (request_ms * max(frames_per_message, 1.0)))
    return min(max(messages, least), MAX_PREFETCH)


def job_prefetch(*, call_ms: float | None, batch_mean: float | None, calls: int, max_batch: int) -> int:
    """Return how many jobs of a level to hold: those of the open calls, and of one more.

    Without that one more, a level would have no job in hand when the next call is chosen. A job that waits
    here behind a long call is lost to other replicas, so long calls hold no more. A job needs two round trips
    to the store besides its call, so short calls hold twice the work that requests do.
    """
    least = (calls + 1) * max(max_batch, 1)
    if call_ms is None or call_ms <= 0:
        return min(least, MAX_PREFETCH)
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    return min(max(math.ceil(2 * IN_HAND_MS / request_ms), least), MAX_PREFETCH)


def worth_changing(current: int, desired: int) -> bool:
    """Return True for a change by half or more: it needs a new consumer, so small changes do not pay."""
    return desired >= current * 1.5 or desired <= current / 1.5

"""Decide how many messages a worker holds unacked (the consumer's prefetch)."""

from __future__ import annotations

import math

IN_HAND_MS = 50.0
MAX_PREFETCH = 256
UNKNOWN_PREFETCH = 2


def prefetch(
    *,
    call_ms: float | None,
    batch_mean: float | None,
    frames_per_message: float,
    in_flight: int,
    company: int = 0,
    batch: int = 0,
) -> int:
    """Messages to hold unsettled: about ``IN_HAND_MS`` of expected work, at least one more than in flight.

    A fixed count would starve late workers on heavy models and idle on light ones. ``company``: requests
    that a call waits for; what it waits for must be able to come. ``batch``: requests that a call takes
    together; while calls run, the next one's must be able to gather, or a slow model that batches would
    never see more than two.
    """
    least = max(in_flight + 1, min(math.ceil(company / max(frames_per_message, 1.0)), MAX_PREFETCH))
    if call_ms is None or call_ms <= 0:
        return max(UNKNOWN_PREFETCH, least)
    least = max(least, math.ceil((in_flight + 1) * batch / max(frames_per_message, 1.0)))
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    messages = math.ceil(IN_HAND_MS / (request_ms * max(frames_per_message, 1.0)))
    return min(max(messages, least), MAX_PREFETCH)


def job_prefetch(*, call_ms: float | None, batch_mean: float | None, calls: int, batch: int) -> int:
    """Jobs of a level to hold unsettled: those of the open calls, and of one more.

    Without that one more, a level of which a job runs would have none in hand when the next is chosen. A job
    that waits here behind a long one is lost to other replicas, so there is no more. A job is held through
    two visits to the store besides its call: short calls want more in hand than interactive requests do.
    """
    least = (calls + 1) * max(batch, 1)
    if call_ms is None or call_ms <= 0:
        return min(least, MAX_PREFETCH)
    request_ms = call_ms / max(batch_mean or 1.0, 1.0)
    return min(max(math.ceil(2 * IN_HAND_MS / request_ms), least), MAX_PREFETCH)


def worth_changing(current: int, wanted: int) -> bool:
    """Whether a new consumer (the only way to change a prefetch) pays: a change by half or more."""
    return wanted >= current * 1.5 or wanted <= current / 1.5

"""Values of the headers ``RateLimit-Policy`` and ``RateLimit`` (draft-ietf-httpapi-ratelimit-headers).

For a rate limit, the quota (``q``) is the burst. The window (``w``) is the time in which an empty token
bucket fills.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from functools import lru_cache

from tidegate.kernel.protocol.access import Allowance

DAY_S = 86_400
MONTH_S = 30 * DAY_S


def policy(allowance: Allowance) -> bytes:
    """Return the value of ``RateLimit-Policy``: the limits of a key."""
    found = []
    if allowance.rate is not None:
        window_s = max(1, math.ceil(allowance.burst / allowance.rate))
        found.append(f'"rate";q={allowance.burst};w={window_s}')
    if allowance.concurrency is not None:
        found.append(f'"concurrency";q={allowance.concurrency};qu="concurrent-requests"')
    if allowance.day is not None:
        found.append(f'"day";q={allowance.day};w={DAY_S}')
    if allowance.month is not None:
        found.append(f'"month";q={allowance.month};w={MONTH_S}')
    return ", ".join(found).encode()


def seconds_left(limit: str, epoch_s: float) -> float:
    """Return how many seconds remain from ``epoch_s`` until the end of the current day or month in UTC.

    ``limit``: ``day`` or ``month``. ``epoch_s``: now, in seconds since the epoch.
    """
    if limit == "day":
        return DAY_S - epoch_s % DAY_S
    return _month_end(int(epoch_s // DAY_S)) - epoch_s


@lru_cache(maxsize=4)
def _month_end(day: int) -> float:
    """Return the end (seconds since the epoch) of the month that contains ``day`` (days since the epoch)."""
    today = datetime.fromtimestamp(day * DAY_S, UTC)
    return (today.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()

"""The headers ``RateLimit-Policy`` and ``RateLimit`` (draft-ietf-httpapi-ratelimit-headers).

A bucket of rate and burst is told as its burst in the time that it takes to fill. What is left is what this
process knows: what it holds and what was in the account when it last heard.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING

from tidegate.kernel.protocol.access import Allowance

if TYPE_CHECKING:
    from services.gateway.domain.key_limiter import KeyLimiter

DAY_S = 86_400
MONTH_S = 30 * DAY_S


def policy(allowance: Allowance) -> bytes:
    """What a key may use at most."""
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


def left(meter: KeyLimiter, epoch_s: float) -> bytes:
    """What is left of each limit (``r``), and in how many seconds it is whole again (``t``)."""
    found = []
    rate, allowance = meter.rate, meter.allowance
    # Every answer to a key has this: hence no min, max and math.ceil.
    if rate is not None and allowance.rate is not None:
        missing = allowance.burst - rate.remaining
        if missing > 0:
            seconds = -(-missing // allowance.rate)
            found.append(b'"rate";r=%d;t=%d' % (allowance.burst - missing, seconds))
        else:
            found.append(b'"rate";r=%d;t=0' % allowance.burst)
    if allowance.concurrency is not None:
        free = allowance.concurrency - meter.under_way
        found.append(b'"concurrency";r=%d' % (free if free > 0 else 0))
    if meter.of_day is not None:
        found.append(b'"day";r=%d;t=%d' % (meter.of_day.remaining, seconds_left("day", epoch_s)))
    if meter.of_month is not None:
        found.append(b'"month";r=%d;t=%d' % (meter.of_month.remaining, seconds_left("month", epoch_s)))
    return b", ".join(found)


def seconds_left(limit: str, epoch_s: float) -> float:
    """Until the ``day`` or ``month`` (UTC) of a time since the epoch is over."""
    if limit == "day":
        return DAY_S - epoch_s % DAY_S
    return _month_end(int(epoch_s // DAY_S)) - epoch_s


@lru_cache(maxsize=4)
def _month_end(day: int) -> float:
    """The end of the month of a day, both since the epoch; the day in days, the end in seconds."""
    today = datetime.fromtimestamp(day * DAY_S, UTC)
    return (today.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()

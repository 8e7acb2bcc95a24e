"""Buckets for latencies, each a tenth wider than the one before, so that small differences can be found."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

FIRST_S = 50e-6
RATIO = 1.1
COUNT = 160  # the buckets reach 200 s, and longer times are in the last bucket


def buckets_of(seconds: np.ndarray) -> np.ndarray:
    """Return how many of these times are in each bucket, as ``COUNT`` integers."""
    import numpy as np  # imported only here, because workers and the autoscaler need only the constants

    scaled = np.log(np.maximum(seconds, FIRST_S) / FIRST_S) / log(RATIO)
    return np.bincount(np.clip(scaled.astype(np.int64), 0, COUNT - 1), minlength=COUNT)


def bucket_of(seconds: float) -> int:
    """Return the number of the bucket that contains a time, counted from 0."""
    if seconds <= FIRST_S:
        return 0
    return min(int(log(seconds / FIRST_S) / log(RATIO)), COUNT - 1)


def upper_s(bucket: int) -> float:
    """Return the upper bound of a bucket in seconds."""
    return float(FIRST_S * RATIO ** (bucket + 1))

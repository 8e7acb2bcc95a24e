"""Decide which records of ended jobs are removed: by age, number, and the memory of their store. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreSize:
    """The memory that the store of the jobs uses, in bytes; its records, and how many of them are over."""

    used_bytes: int
    records: int
    over: int


@dataclass(frozen=True, slots=True)
class Retention:
    """Limits on the records of jobs that are over; the oldest go first.

    ``bytes``: of the store's memory, 0 for no limit. A job younger than ``at_least_s`` is not removed for it,
    so that its caller has time to fetch the result.
    """

    keep_s: float
    count: int
    bytes: int
    at_least_s: float

    def surplus(self, size: StoreSize) -> int:
        """Return how many records to remove, so that the store is within ``bytes`` again.

        Every record counts as the mean of all: jobs that wait are no larger than those that are over.
        """
        if not self.bytes or size.used_bytes <= self.bytes or not size.records:
            return 0
        each = size.used_bytes / size.records
        return min(size.over, int((size.used_bytes - self.bytes) / each) + 1)

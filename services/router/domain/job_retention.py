"""Decide how many records of finished jobs to remove, by age, by number and by memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreSize:
    """The size of the store of jobs. ``records``: their number. ``over``: the number of finished ones."""

    used_bytes: int
    records: int
    over: int


@dataclass(frozen=True, slots=True)
class Retention:
    """Limits on the records of finished jobs; the oldest are removed first.

    ``bytes``: memory of the store, 0 for no limit. Even above this limit, a finished job is kept for
    ``at_least_s`` seconds, so that its caller can fetch the result.
    """

    keep_s: float
    count: int
    bytes: int
    at_least_s: float

    def surplus(self, size: StoreSize) -> int:
        """Return how many records to remove to bring the store below ``bytes``.

        All records are assumed to have the mean size.
        """
        if not self.bytes or size.used_bytes <= self.bytes or not size.records:
            return 0
        mean = size.used_bytes / size.records
        return min(size.over, int((size.used_bytes - self.bytes) / mean) + 1)

"""Decide how many records of finished jobs to remove, by age, by number and by memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreSize:
    """The size of the job store: memory, number of records, and number of finished jobs (``over``)."""

    used_bytes: int
    records: int
    over: int


@dataclass(frozen=True, slots=True)
class Retention:
    """Limits on the records of finished jobs. Above a limit, the oldest records are removed first.

    ``keep_s``: the highest age in seconds. ``count``: the highest number of finished jobs. ``bytes``: the
    highest number of bytes that the store uses in memory; 0 for no limit. A job that finished less than
    ``at_least_s`` seconds ago is kept even above ``bytes``, so that its caller can fetch the result.
    """

    keep_s: float
    count: int
    bytes: int
    at_least_s: float

    def surplus(self, size: StoreSize) -> int:
        """Return how many records must be removed to bring the store below ``bytes``.

        The number is an estimate: the size of a single record is not known, so the mean size is used.
        """
        if not self.bytes or size.used_bytes <= self.bytes or not size.records:
            return 0
        mean = size.used_bytes / size.records
        return min(size.over, int((size.used_bytes - self.bytes) / mean) + 1)

"""Decide for each chunk of a stream whether to pass it on, to drop it or to fail the stream."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ChunkPlace(Enum):
    """The decision about a chunk or the end of a stream."""

    NEXT = "next"
    OLD = "old"  # a duplicate, or from an earlier attempt: drop it
    RESTARTED = "restarted"  # from a later attempt, but the caller has chunks of an earlier one
    GAP = "gap"  # chunks before it are missing


@dataclass(slots=True)
class ChunkOrder:
    """The attempt whose chunks a stream passes on, and the number of the next chunk."""

    attempt: int = 0
    expected: int = 0

    @property
    def emitted(self) -> bool:
        """Return True if the caller already has a chunk. Then a restart would repeat it."""
        return self.expected > 0

    def place(self, attempt: int, seq: int, *, end: bool) -> ChunkPlace:
        """Decide about a chunk or an end. The ``seq`` of an end is the number of chunks before it.

        If a chunk is NEXT, the chunk after it is expected from now on.
        """
        if attempt < self.attempt:
            return ChunkPlace.OLD
        if attempt > self.attempt:
            if self.emitted:
                return ChunkPlace.RESTARTED
            self.attempt = attempt
        if seq != self.expected:
            return ChunkPlace.GAP if end or seq > self.expected else ChunkPlace.OLD
        if not end:
            self.expected += 1
        return ChunkPlace.NEXT

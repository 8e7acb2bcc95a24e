"""Decide for each chunk of a stream whether to pass it on, to drop it or to fail the stream."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ChunkPlace(Enum):
    """The position of a chunk, or of the end of a stream, compared with the expected position."""

    NEXT = "next"
    OLD = "old"  # a duplicate, or from an earlier attempt: must be dropped
    RESTARTED = "restarted"  # from a later attempt, but the caller has chunks of an earlier one
    GAP = "gap"  # chunks before it are missing


@dataclass(slots=True)
class ChunkOrder:
    """The order of a stream's chunks. ``attempt``: the current one. ``expected``: the next chunk's number."""

    attempt: int = 0
    expected: int = 0

    @property
    def emitted(self) -> bool:
        """Return True if the caller already has a chunk. Then a new attempt would repeat chunks."""
        return self.expected > 0

    def place(self, attempt: int, seq: int, *, end: bool) -> ChunkPlace:
        """Return the position of a received chunk or of the end of the stream.

        ``seq``: the chunk's number; for the end, the number of all chunks. If a chunk is NEXT, the following
        chunk is expected from now on.
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

"""Where a chunk belongs in its stream: which to take, which to drop, and what breaks the stream."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ChunkPlace(Enum):
    """What becomes of a chunk, or of a stream's end."""

    NEXT = "next"
    OLD = "old"  # had before, or of an attempt that was given up: dropped
    RESTARTED = "restarted"  # a later attempt, and the caller has chunks of the one before
    GAP = "gap"


@dataclass(slots=True)
class ChunkOrder:
    """The attempt that a stream takes its chunks from, and the number of the next one."""

    attempt: int = 0
    expected: int = 0

    @property
    def emitted(self) -> bool:
        """Whether the caller has a chunk already, so that beginning again would repeat it."""
        return self.expected > 0

    def place(self, attempt: int, seq: int, *, end: bool) -> ChunkPlace:
        """Judge a chunk by its number, an end by how many chunks there were; NEXT moves on."""
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

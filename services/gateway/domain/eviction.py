"""Choose which incomplete request bodies to drop when memory for bodies is short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# A body that was watched for less than this many seconds is not yet judged as slow.
WATCHED_S = 1.0


class Unfinished(NamedTuple):
    """An incomplete body. ``held``: its bytes in memory.

    ``moved``: the bytes that arrived in the last ``watched_s`` seconds.
    """

    held: int
    watched_s: float
    moved: int
    known: bool  # the caller has sent a valid credential


def choose(bodies: Sequence[Unfinished], need: int, bytes_per_s: int, *, for_known: bool) -> list[int]:
    """Return the indexes of the bodies to drop. They free ``need`` bytes, or as many as possible.

    Bodies slower than ``bytes_per_s`` may be dropped. ``for_known``: True if a caller with a valid credential
    needs the memory. Then all bodies of callers without a credential may be dropped too. Bodies of callers
    without a credential are dropped first, then slower bodies, then larger bodies.
    """
    candidates = []
    for at, body in enumerate(bodies):
        slow = body.watched_s >= WATCHED_S and body.moved < body.watched_s * bytes_per_s
        if body.held and (slow or (for_known and not body.known)):
            pace = body.moved / body.watched_s if slow else float("inf")
            candidates.append((body.known, pace, -body.held, at))
    chosen, free = [], 0
    for *_, at in sorted(candidates):
        if free >= need:
            break
        chosen.append(at)
        free += bodies[at].held
    return chosen

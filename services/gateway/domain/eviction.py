"""Choose which incomplete request bodies to drop when memory for bodies is short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# A body counts as slow only after it was watched for this many seconds.
WATCHED_S = 1.0


class Unfinished(NamedTuple):
    """An incomplete request body. ``held``: its bytes in memory.

    ``watched_s``: how many seconds it has been watched. ``moved``: the bytes that arrived in this time.
    """

    held: int
    watched_s: float
    moved: int
    known: bool  # the caller has sent a valid credential


def choose(bodies: Sequence[Unfinished], need: int, bytes_per_s: int, *, for_known: bool) -> list[int]:
    """Return the indexes of the bodies to drop, so that ``need`` bytes become free.

    A body may be dropped if it arrives slower than ``bytes_per_s``. ``for_known``: True if a caller with a
    valid credential needs the memory. In this case, each body of a caller without a valid credential may be
    dropped too. If all these bodies together have fewer than ``need`` bytes, return all of them.

    Bodies of callers without a valid credential are dropped first. Among these bodies, and then among the
    others, the slowest body is dropped first. If two bodies are equally slow, the one with more bytes in
    memory is dropped first.
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

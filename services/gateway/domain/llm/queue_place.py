"""Estimate the place of a waiting request in its queue."""

from __future__ import annotations

from typing import NamedTuple


class QueuePlace(NamedTuple):
    """A request's place: how many requests are before it, and the estimated seconds until its turn, if known.

    ``waking``: True if no replica is ready. A replica may be starting.
    """

    position: int
    wait_s: float | None
    waking: bool

    def comment(self) -> bytes:
        """Return the place as a comment in a stream of server-sent events."""
        wait = b"" if self.wait_s is None else b" wait_s=%.1f" % self.wait_s
        state = b" state=waking" if self.waking else b""
        return b": x-tidegate-queue position=%d%b%b\n\n" % (self.position, wait, state)


def place(
    *, before: int, left: int, waited_s: float, room: int, ready: int, start_ms: float | None
) -> QueuePlace:
    """Estimate a place in a queue that is mostly first in, first out.

    ``before``: the number of requests in flight when this request arrived. ``left``: how many requests have
    ended in the ``waited_s`` seconds since then. ``room``: how many requests one replica runs at the same
    time. ``ready``: the number of ready replicas. ``start_ms``: the ms until a replica is ready, if known.
    """
    position = max(0, before - left - room * ready)
    if ready == 0:
        return QueuePlace(position, None if start_ms is None else start_ms / 1e3, True)
    if position == 0:
        return QueuePlace(0, 0.0, False)
    return QueuePlace(position, position * waited_s / left if left else None, False)

"""Estimate the position of a waiting request in its queue."""

from __future__ import annotations

from typing import NamedTuple


class QueuePlace(NamedTuple):
    """The estimated position of a request in its queue.

    ``position``: how many requests are before it. ``wait_s``: the seconds until a replica takes it; None if
    unknown. ``waking``: True if no replica is ready; one may be starting.
    """

    position: int
    wait_s: float | None
    waking: bool

    def comment(self) -> bytes:
        """Return the position as a comment line for a stream of server-sent events."""
        wait = b"" if self.wait_s is None else b" wait_s=%.1f" % self.wait_s
        state = b" state=waking" if self.waking else b""
        return b": x-tidegate-queue position=%d%b%b\n\n" % (self.position, wait, state)


def place(
    *, before: int, left: int, waited_s: float, room: int, ready: int, start_ms: float | None
) -> QueuePlace:
    """Estimate a request's position in a queue that is mostly first in, first out.

    ``before``: the number of requests in flight when this request arrived. ``left``: the number of requests
    that have ended in the ``waited_s`` seconds since then. ``room``: the number of requests that one replica
    runs at the same time. ``ready``: the number of ready replicas. ``start_ms``: the ms until a replica is
    ready; None if unknown.
    """
    position = max(0, before - left - room * ready)
    if ready == 0:
        return QueuePlace(position, None if start_ms is None else start_ms / 1e3, True)
    if position == 0:
        return QueuePlace(0, 0.0, False)
    return QueuePlace(position, position * waited_s / left if left else None, False)

"""Decide which deliveries can be acked together."""

from __future__ import annotations

from typing import NamedTuple


class Ack(NamedTuple):
    """A ``basic.ack`` of a tag; with ``multiple`` it also acks every earlier tag."""

    tag: int
    multiple: bool


class AckTracker:
    """The unacked deliveries of one channel.

    Calls may finish in any order. So an ack has ``multiple`` only if all deliveries before its tag are
    settled. Otherwise it would ack deliveries whose calls still run.
    """

    def __init__(self) -> None:
        self._open: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def delivered(self, tag: int) -> None:
        """Add a delivery. Within a channel, each delivery has a larger tag than the delivery before."""
        self._open[tag] = None

    def nacked(self, tag: int) -> bool:
        """Remove a nacked delivery. Return True if it was unacked until now."""
        return self._open.pop(tag, False) is None

    def settle(self, tags: list[int]) -> list[Ack]:
        """Remove the deliveries with these tags, because they are settled. Return the acks to send."""
        # Two calls may settle the same delivery. It is acked only once.
        done = [tag for tag in dict.fromkeys(tags) if tag in self._open]
        for tag in done:
            del self._open[tag]
        lowest = next(iter(self._open), None)
        together = [tag for tag in done if lowest is None or tag < lowest]
        acks = [Ack(max(together), len(together) > 1 or lowest is None)] if together else []
        return acks + [Ack(tag, False) for tag in sorted(done) if lowest is not None and tag > lowest]

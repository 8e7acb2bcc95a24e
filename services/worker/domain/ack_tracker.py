"""Which deliveries may be acked together."""

from __future__ import annotations

from typing import NamedTuple


class Ack(NamedTuple):
    """``basic.ack`` of a tag; ``multiple``: and of every earlier one."""

    tag: int
    multiple: bool


class AckTracker:
    """The unsettled deliveries of one channel.

    ``multiple`` is used only up to the tag below which everything is settled: a call that finishes before an
    earlier one must not ack the earlier one's work away.
    """

    def __init__(self) -> None:
        self._open: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def delivered(self, tag: int) -> None:
        """A delivery came; tags only grow within a channel."""
        self._open[tag] = None

    def given_back(self, tag: int) -> bool:
        """The broker takes a delivery back; whether it was open."""
        return self._open.pop(tag, False) is None

    def settle(self, tags: list[int]) -> list[Ack]:
        """The acks to send, now that ``tags`` are done."""
        # Two may say of one delivery at the same time that it is done; it is acked once.
        done = [tag for tag in dict.fromkeys(tags) if tag in self._open]
        for tag in done:
            del self._open[tag]
        lowest = next(iter(self._open), None)
        together = [tag for tag in done if lowest is None or tag < lowest]
        acks = [Ack(max(together), len(together) > 1 or lowest is None)] if together else []
        return acks + [Ack(tag, False) for tag in sorted(done) if lowest is not None and tag > lowest]

"""Close HTTP connections that have reached a timeout, or that must end so that new ones can be accepted."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterable
from typing import Protocol

from prometheus_client import Counter

from tidegate.kernel import telemetry
from tidegate.kernel.http.timeouts import KEPT_S, HttpLimits, Standing, peer_of, to_shed

log = telemetry.logger(__name__)

CLOSED = Counter(
    "tidegate_http_closed_total", "Connections that a server closed early, by reason.", ["reason"]
)

SWEEP_S = 1.0
# How many connections are checked in one turn of the event loop. It is low, so that a sweep delays no request
# noticeably.
SLICE = 32
# When there are too many connections, some are closed to accept a new one. The search for them takes LOOK
# connections at a time, oldest first, and ranks them. It ends at the first group of LOOK connections in which
# some may be closed. SHED_SHARE: the largest share of all connections that one search closes. If this share
# is less than one connection, the search closes one. If one peer has too many connections, only the
# connections of this peer are searched and counted.
LOOK = 512
SHED_SHARE = 1 / 64
# How many file descriptors are reserved for everything except HTTP connections.
RESERVED_FILES = 512


class Connected(Protocol):
    """A connection with timeouts.

    ``since``: the time at which its present phase began. ``held_head``: how many bytes of an incomplete head
    it has received.
    """

    since: float
    held_head: int

    def standing(self) -> Standing:
        """Return the rank of this connection among those that may be closed for a new one."""

    def check(self, now: float) -> None:
        """Close this connection if a timeout has passed."""

    def shed(self, reason: str) -> None:
        """Close this connection immediately."""


class Connections:
    """The open connections of a process, oldest first, with the sweeps that check them."""

    def __init__(self, limits: HttpLimits, now: float = 0.0) -> None:
        self.limits = limits
        self.now = now  # the clock of the sweeps; it almost stands still while the process is stopped
        self.pending_heads = 0
        # True: another process of the service accepts new connections. So each response ends its connection.
        self.retiring = False
        self._most = limits.connections
        self._all: dict[Connected, str] = {}
        self._by_peer: dict[str, dict[Connected, None]] = {}
        self._in_vain: dict[str | None, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._swept_at = 0.0

    def __len__(self) -> int:
        return len(self._all)

    def fit_files(self, others: int = 0) -> None:
        """Increase the soft limit of open files as needed.

        If the hard limit is too low, accept fewer connections. ``others``: the number of file descriptors to
        reserve for further connections that :class:`Connections` does not count.
        """
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        reserved = RESERVED_FILES + others
        needed = self.limits.connections + reserved
        if soft != resource.RLIM_INFINITY and soft < needed:
            soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft != resource.RLIM_INFINITY and soft < needed:
            self._most = max(soft - reserved, soft // 2)
            log.warning(
                "the limit of open files allows fewer connections than TIDEGATE_HTTP_CONNECTIONS",
                extra={"connections": self._most, "open_files": soft},
            )

    def add(self, connection: Connected, address: str) -> bool:
        """Count a new connection. Return False if there are too many and none of them may be closed."""
        peer = peer_of(address)
        if len(self._all) >= self._most and not self._shed(None, self._all):
            return False
        of_peer = self._by_peer.get(peer, {})
        if len(of_peer) >= self.limits.connections_per_peer and not self._shed(peer, of_peer):
            return False
        self._all[connection] = peer
        self._by_peer.setdefault(peer, {})[connection] = None
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._swept_at = loop.time()
            self._timer = loop.call_later(SWEEP_S, self._sweep)
        return True

    def discard(self, connection: Connected) -> None:
        """Remove a connection that has ended."""
        peer = self._all.pop(connection, None)
        if peer is None:
            return
        of_peer = self._by_peer[peer]
        del of_peer[connection]
        if not of_peer:
            del self._by_peer[peer]

    def hold_head(self, connection: Connected, count: int) -> None:
        """Add ``count`` bytes of an incomplete head to the total of this process.

        If the total exceeds ``limits.pending_head_bytes``, close other connections with an incomplete head,
        oldest first. Stop when the total is at most half of this limit.
        """
        self.pending_heads += count
        if self.pending_heads <= self.limits.pending_head_bytes:
            return
        for each in sorted(self._all, key=lambda one: one.since):
            if self.pending_heads <= self.limits.pending_head_bytes // 2:
                break
            if each is not connection and each.held_head:
                each.shed("pending_heads")

    def _shed(self, peer: str | None, among: Iterable[Connected]) -> bool:
        """Close some of the connections in ``among``. Return False if none of them may be closed.

        ``peer``: the peer of these connections; None if they can belong to different peers.
        """
        if self._in_vain.get(peer) == self.now:
            return False  # the last try found nothing to close, and there was no sweep after it
        found = list(among)
        count = max(1, int(len(found) * SHED_SHARE))
        # Connections are ranked in parts, because ranking all would block the event loop for tens of
        # milliseconds.
        for known_before in (None, self.now - KEPT_S):
            for begin in range(0, len(found), LOOK):
                some = found[begin : begin + LOOK]
                places = to_shed([each.standing() for each in some], count, known_before)
                for at in places:
                    self.discard(some[at])
                    some[at].shed("connections")
                if places:
                    return True
        self._in_vain = {peer: self.now}
        return False

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        # While the process is stopped or the loop is blocked, the process reads from no connection. However
        # long this takes, the clock advances by at most two intervals of the sweep. So a long stop causes no
        # timeout.
        self.now += min(now - self._swept_at, 2 * SWEEP_S)
        self._swept_at = now
        self._look_at(list(self._all), 0)

    def _look_at(self, connections: list[Connected], begin: int) -> None:
        end = begin + SLICE
        for each in connections[begin:end]:
            try:
                each.check(self.now)
            except Exception:
                log.exception("a connection could not be checked; it is closed")
                each.shed("error")
        loop = asyncio.get_running_loop()
        if end < len(connections):
            # Thousands of connections may exist, so the checks are spread over half a second.
            loop.call_later(SWEEP_S / 2 * SLICE / len(connections), self._look_at, connections, end)
        elif self._all:
            self._timer = loop.call_later(SWEEP_S, self._sweep)
        else:
            self._timer = None

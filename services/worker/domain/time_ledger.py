"""Account for every nanosecond of a replica: start, idle time, shares of calls, wasted calls.

Calls that run at the same time share the replica's time equally (processor sharing). One virtual clock
measures the shares of all calls. In each interval, the clock advances by the passed time divided by the
number of open calls. The share of a call is the virtual clock at its end minus the virtual clock at its
start. So the cost of this accounting per call does not grow with the number of open calls.

All numbers are integers, and remainders are carried over. So the sum of all parts is exactly the passed time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from typing import Protocol

from tidegate.kernel.protocol.envelope import Request
from tidegate.kernel.protocol.replica_time import BUSY, IDLE, STARTING, WASTED, Part, Spent
from tidegate.kernel.protocol.tenant import caller_of, endpoint_of

# A replica counts this many tenants (a caller at an endpoint) separately. Further tenants are counted
# together.
MOST_TENANTS = 1000
OTHERS = b"(others)"


class HasRequest(Protocol):
    """An object with a ``request``, such as a queued request or a queued job."""

    request: Request


class TimeLedger:
    """The time of one replica since its launch. ``clock`` returns ns of a monotonic clock.

    ``before_ns``: the time between the launch and the creation of this object. It counts as start-up.
    """

    __slots__ = (
        "_at",
        "_begun",
        "_carry",
        "_clock",
        "_now",
        "_open",
        "_serving",
        "_shares",
        "_wasted",
        "calls_ns",
        "idle",
        "starting",
    )  # fmt: skip

    def __init__(self, before_ns: int = 0, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._now = clock
        self._at = clock()
        self._serving = False
        self._open = 0  # the number of open calls
        self._clock = 0  # the virtual clock of the module's docstring, in ns
        self._begun = 0  # the sum of `_clock` at the start of each open call
        self._carry = 0  # ns that are not yet divided among the open calls
        self._shares: dict[bytes, list[int]] = {}
        self._wasted: dict[str, list[int]] = {}
        self.starting = before_ns
        self.idle = 0
        self.calls_ns = 0  # the sum of all calls' durations, in ns

    def serve(self, serving: bool) -> None:
        """Count time without calls as idle time if ``serving`` is True, and as start-up time otherwise.

        This applies from now on, until the next call of this method.
        """
        self._advance()
        self._serving = serving

    def begin(self) -> int:
        """Begin a call, and return a mark of its start.

        When the call ends, the calling code must pass the mark to :meth:`answered` or to :meth:`waste`.
        """
        self._advance()
        self._open += 1
        self._begun += self._clock
        return self._clock

    def answered(
        self, mark: int, group: Sequence[HasRequest], now_ms: float = 0.0, cancelled: Container[bytes] = ()
    ) -> None:
        """End a call, and divide its time among its requests in proportion to their numbers of rows.

        A request's share of the time is counted as wasted if no caller waited for the answer. This is true if
        its deadline passed before ``now_ms``, or if its id is in ``cancelled``.
        """
        spent = self._end(mark)
        tenant, total, usual = group[0].request.tenant, 0, not cancelled
        for item in group:
            request = item.request
            total += request.rows or 1
            if request.tenant != tenant or request.deadline_ms <= now_ms:
                usual = False
        if usual:  # all requests are from one tenant, and it still waits: this common case must be quick
            place = self._shares.get(tenant) or self._place(tenant)
            place[0] += spent
            place[1] += len(group)
            place[2] += total
            return
        self._divide(spent, total, group, now_ms, cancelled)

    def _divide(
        self,
        spent: int,
        total: int,
        group: Sequence[HasRequest],
        now_ms: float,
        cancelled: Container[bytes],
    ) -> None:
        """Divide the time of a call among its requests. The call has ``total`` rows."""
        useful: dict[bytes, list[int]] = {}
        unwanted: dict[str, list[int]] = {}
        for item in group:
            request = item.request
            if request.deadline_ms <= now_ms:
                found = unwanted.setdefault("expired", [0, 0])
            elif request.id in cancelled:
                found = unwanted.setdefault("cancelled", [0, 0])
            else:
                found = useful.setdefault(request.tenant, [0, 0])
            found[0] += 1
            found[1] += request.rows or 1
        for tenant, (requests, rows) in useful.items():
            share = spent * rows // total
            spent, total = spent - share, total - rows
            self._add(self._place(tenant), share, requests, rows)
        for reason, (requests, rows) in unwanted.items():
            share = spent * rows // total
            spent, total = spent - share, total - rows
            self._add(self._wasted.setdefault(reason, [0] * len(Spent._fields)), share, requests, rows)

    def waste(self, mark: int, reason: str, requests: int = 1, rows: int = 0) -> None:
        """End a call whose time was wasted."""
        place = self._wasted.setdefault(reason, [0] * len(Spent._fields))
        self._add(place, self._end(mark), requests, rows)

    def add_tokens(self, tenant: bytes, read: int, written: int, cached: int = 0) -> None:
        """Count the tokens of a tenant's request."""
        place = self._place(tenant)
        place[3] += read
        place[4] += written
        place[5] += cached

    def parts(self) -> tuple[dict[Part, Spent], int]:
        """Return the parts of the time until now, and the nanoseconds of the calls that are still open.

        The sum of all these times is the time since the launch.
        """
        self._advance()
        found = {Part(STARTING): Spent(self.starting), Part(IDLE): Spent(self.idle)}
        for reason, counts in self._wasted.items():
            found[Part(WASTED, reason)] = Spent(*counts)
        for tenant, counts in self._shares.items():
            part = Part(BUSY, "", caller_of(tenant), endpoint_of(tenant))
            found[part] = found.get(part, Spent()).plus(Spent(*counts))
        return found, self._open * self._clock - self._begun + self._carry

    def _place(self, tenant: bytes) -> list[int]:
        place = self._shares.get(tenant)
        if place is None:
            if len(self._shares) >= MOST_TENANTS:
                tenant = OTHERS
            place = self._shares.setdefault(tenant, [0] * len(Spent._fields))
        return place

    @staticmethod
    def _add(place: list[int], ns: int, requests: int, rows: int) -> None:
        place[0] += ns
        place[1] += requests
        place[2] += rows

    def _advance(self) -> None:
        now = self._now()
        passed, self._at = now - self._at, now
        if self._open:
            each, self._carry = divmod(passed + self._carry, self._open)
            self._clock += each
            self.calls_ns += passed * self._open
        elif self._serving:
            self.idle += passed
        else:
            self.starting += passed

    def _end(self, mark: int) -> int:
        self._advance()
        self._open -= 1
        self._begun -= mark
        spent = self._clock - mark
        if not self._open:
            spent, self._carry = spent + self._carry, 0
        return spent

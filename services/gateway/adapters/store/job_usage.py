"""The usage counts of jobs. They grow when a job ends, and stay in the store until a gateway reports them."""

from __future__ import annotations

import os
from datetime import date, timedelta

from redis.asyncio import Redis

from tidegate.kernel.protocol.usage import COUNTS, Subject, UsageReport
from tidegate.kernel.store.connection import Connected
from tidegate.kernel.store.scripts import Scripts

# If a report is not settled within this time, another gateway may take it and publish it again.
REPORT_MS = 60_000
_EPOCH = date(1970, 1, 1)


class JobUsageStore(Connected):
    """Typed access to the counts. Every failure raises ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._scripts = Scripts(redis)

    async def take(self) -> UsageReport | None:
        """Move the counts that are not in a report yet into a new report, and return the report.

        The calling code must publish the report, and then :meth:`settle` it. If a report is not settled
        within ``REPORT_MS``, a later call returns the same report again. Return None if there are no such
        counts and no such report.
        """
        taken = await self._scripts.run("used_take", [os.urandom(8).hex(), REPORT_MS])
        if not taken:
            return None
        name, flat = taken
        counts: dict[Subject, list[int]] = {}
        for field, count in zip(flat[::2], flat[1::2], strict=True):
            day, principal, endpoint, what = field.decode().split("\n")
            subject = Subject(_EPOCH + timedelta(days=int(day)), principal, endpoint)
            counts.setdefault(subject, [0] * len(COUNTS))[COUNTS.index(what)] += int(count)
        return UsageReport(name.decode(), 0, {subject: tuple(n) for subject, n in counts.items()})

    async def settle(self, report: UsageReport) -> None:
        """Delete the counts of a report that was delivered."""
        await self._scripts.run("used_settle", [report.incarnation])

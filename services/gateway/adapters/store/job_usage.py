"""What callers used by jobs: counted with the end of each, until somebody has reported it."""

from __future__ import annotations

import os
from datetime import date, timedelta

from redis.asyncio import Redis

from tidegate.kernel.protocol.usage import COUNTS, Subject, UsageReport
from tidegate.kernel.store.connection import Connected
from tidegate.kernel.store.scripts import Scripts

# Whoever has taken counts and not settled them by then is gone: somebody else reports them, as the same.
REPORT_MS = 60_000
_EPOCH = date(1970, 1, 1)


class JobUsageStore(Connected):
    """Takes and settles the counts; every failure is a ``StoreUnavailable``."""

    def __init__(self, redis: Redis) -> None:
        super().__init__(redis)
        self._scripts = Scripts(redis)

    async def take(self) -> UsageReport | None:
        """What is to be reported, and then :meth:`settle`d; None: nothing. The same may be taken again."""
        found = await self._scripts.run("used_take", [os.urandom(8).hex(), REPORT_MS])
        if not found:
            return None
        name, flat = found
        counts: dict[Subject, list[int]] = {}
        for field, count in zip(flat[::2], flat[1::2], strict=True):
            day, principal, endpoint, what = field.decode().split("\n")
            subject = Subject(_EPOCH + timedelta(days=int(day)), principal, endpoint)
            counts.setdefault(subject, [0] * len(COUNTS))[COUNTS.index(what)] += int(count)
        return UsageReport(name.decode(), 0, {subject: tuple(n) for subject, n in counts.items()})

    async def settle(self, report: UsageReport) -> None:
        """A taken report is where it belongs."""
        await self._scripts.run("used_settle", [report.incarnation])

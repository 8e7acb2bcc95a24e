"""One router leads: it holds a lease in the store of the jobs, and renews it until it stops.

If the store of the jobs is away, nobody can take the lease, so the last leader goes on. Should another router
reach the store when this one does not, that router gets a greater epoch, and the store of the route table
refuses the smaller one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from prometheus_client import Gauge

from tidegate.kernel import tasks, telemetry
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.store.leader import LeaderStore

log = telemetry.logger(__name__)

# Renewals in the length of one lease: two may fail before it ends.
RENEWALS = 4

LEADS = Gauge("tidegate_router_leads", "1 on the router that leads, 0 on the others.")


class Leadership:
    """Keeps the lease, or waits for it. ``holder`` is the router that leads, as far as is known."""

    def __init__(
        self,
        store: LeaderStore,
        name: str,
        *,
        lease_s: float,
        seen: int = 0,
        is_dead: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """``seen``: the highest epoch known from before the start. ``is_dead``: whether a holder has died."""
        self._store = store
        self._name = name
        self._lease_s = lease_s
        self._seen = seen
        self._is_dead = is_dead
        self._until = 0.0
        self._away = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._on_change: list[Callable[[], None]] = []
        self.epoch = 0
        self.holder = ""
        LEADS.set_function(lambda: float(self.leads))

    def start(self) -> None:
        """Begin to ask for the lease."""
        self._task = asyncio.create_task(self._run(), name="leadership")

    async def stop(self) -> None:
        """Give the lease to the next router at once."""
        await tasks.end(self._task)
        with contextlib.suppress(StoreUnavailable):
            await self._store.resign(self._name)
        self.holder = ""
        await self._store.close()

    def on_change(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` whenever another router leads, or this one does."""
        self._on_change.append(tell)

    @property
    def leads(self) -> bool:
        """Return True if this router leads; a process that slept does not until it has asked again."""
        return self.holder == self._name and (self._away or time.monotonic() < self._until)

    @property
    def standing(self) -> str:
        """Say why this router does not lead, for an error message or a health check."""
        if self.holder:
            return f"Router {self.holder.partition('@')[0]} leads; this one waits."
        if self._away:
            return "No router leads yet: the store of the jobs does not answer."
        return "No router leads yet; the next one takes over when the last lease has ended."

    def overtaken(self, epoch: int) -> None:
        """Stop leading and ask again at once: the route table in the store has a greater epoch than ours."""
        self._seen = max(self._seen, epoch)
        self.holder = ""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            pause_s = await self._ask()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

    async def _ask(self) -> float:
        """Claim or renew the lease; return the seconds until the next time."""
        pause_s = self._lease_s / RENEWALS
        asked_at, led = time.monotonic(), self.leads
        try:
            lease = await self._store.claim(self._name, self._lease_s, self._seen)
            if lease.holder != self._name and self._is_dead(lease.holder):
                # Nobody needs to wait for the lease of a router that was killed on this machine.
                lease = await self._store.claim(self._name, self._lease_s, self._seen, lease.holder)
        except StoreUnavailable as error:
            if not self._away:
                log.warning("the lease cannot be renewed", extra={"problem": error.message, "leads": led})
            self._away = True
            return pause_s
        self._away = False
        changed = (lease.holder, lease.epoch) != (self.holder, self.epoch)
        self.holder, self.epoch = lease.holder, lease.epoch
        ours = lease.holder == self._name
        self._until = asked_at + lease.lasts_s if ours else 0.0
        if changed:
            log.info("router leads", extra={"holder": lease.holder, "epoch": lease.epoch, "ours": ours})
            for tell in self._on_change:
                tell()
        return pause_s if ours else min(pause_s, lease.lasts_s + 0.01)

"""Elect the leader among the routers.

The leader holds a lease in the store of jobs, and renews this lease until the leader stops.

While the store of jobs does not answer, no router can take the lease, so the last leader continues. If only
the leader cannot reach this store, another router takes the lease with a greater epoch. From then on, the
store of the route table rejects the old leader's tables, because their epoch is smaller.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from prometheus_client import Gauge

from tidegate.kernel import telemetry
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import StoreUnavailable
from tidegate.kernel.store.leader import LeaderStore

log = telemetry.logger(__name__)

# The lease is renewed this many times in its lifetime, so it does not expire if two renewals in a row fail.
RENEWALS = 4

LEADS = Gauge("tidegate_router_leads", "1 on the router that leads, 0 on the others.")


class Leadership:
    """The part of this router that claims and renews the leader's lease.

    ``holder``: the name of the leader, as far as this router knows.
    """

    def __init__(
        self,
        store: LeaderStore,
        name: str,
        *,
        lease_s: float,
        seen: int = 0,
        is_dead: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """``seen``: the highest epoch that this router had stored before it started.

        ``is_dead``: a function that gets the name of a router, and returns True if that router has died.
        """
        self._store = store
        self._name = name
        self._lease_s = lease_s
        self._seen = seen
        self._is_dead = is_dead
        self._until = 0.0
        self._away = False
        self._loop = RepeatingTask("leadership", self._step)
        self._on_change: list[Callable[[], None]] = []
        self.epoch = 0
        self.holder = ""
        LEADS.set_function(lambda: float(self.leads))

    def start(self) -> None:
        """Start to claim the lease."""
        self._loop.start()

    async def stop(self) -> None:
        """Release the lease, so that another router can take it immediately."""
        await self._loop.stop()
        with contextlib.suppress(StoreUnavailable):
            await self._store.resign(self._name)
        self.holder = ""
        await self._store.close()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever the leader changes."""
        self._on_change.append(callback)

    @property
    def leads(self) -> bool:
        """Return True if this router leads. While the store does not answer, the last leader still leads."""
        return self.holder == self._name and (self._away or time.monotonic() < self._until)

    @property
    def why_not(self) -> str:
        """Return why this router does not lead, for error messages and health checks."""
        if self.holder:
            return f"Router {self.holder.partition('@')[0]} leads; this one is on standby."
        if self._away:
            return "No router leads yet: the store of jobs does not answer."
        return "No router leads yet. One takes over when the last lease expires."

    def overtaken(self, epoch: int) -> None:
        """Stop leading, because another router has published a table with the greater ``epoch``.

        Then claim the lease again. A new lease gets an even greater epoch.
        """
        self._seen = max(self._seen, epoch)
        self.holder = ""
        self._loop.wake()

    async def _step(self) -> float:
        """Claim or renew the lease. Return the seconds until the next renewal."""
        pause_s = self._lease_s / RENEWALS
        claimed_at, led = time.monotonic(), self.leads
        try:
            lease = await self._store.claim(self._name, self._lease_s, self._seen)
            if lease.holder != self._name and self._is_dead(lease.holder):
                # The holder ran on this machine and has died, so take its lease before it expires.
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
        self._until = claimed_at + lease.lasts_s if ours else 0.0
        if changed:
            log.info("router leads", extra={"holder": lease.holder, "epoch": lease.epoch, "ours": ours})
            for callback in self._on_change:
                callback()
        return pause_s if ours else min(pause_s, lease.lasts_s + 0.01)

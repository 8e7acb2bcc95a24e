"""Watch every endpoint: read the traffic and the replicas, and store a history.

Only the leader watches. Gateways and workers report totals. The history contains the growth of these totals
from one reading to the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.watch_file import WatchFile
from services.router.domain.watch.history import History
from services.router.domain.watch.readings import Reading, Readings, deployments_of
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.models import Endpoint
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

# Seconds after which a standby router checks again whether it leads.
STANDBY_S = 1.0

# A function that returns the time (seconds since the epoch) and the Deployment of each dead letter.
Letters = Callable[[], Iterable[tuple[float, str]]]


class EndpointWatch:
    """One of the router's loops. It reads the traffic, and adds it to :attr:`history`.

    :attr:`last`: the last reading.
    """

    def __init__(
        self,
        store: Store,
        registry: RegistryCache,
        leads: Callable[[], bool],
        file: WatchFile,
        letters: Letters,
        *,
        every_s: float,
        day_s: float,
    ) -> None:
        self._store = store
        self._registry = registry
        self._leads = leads
        self._file = file
        self._letters = letters
        self._every_s = every_s
        self.day_s = day_s
        self._readings = Readings()
        self._loop = RepeatingTask("watch", self._step, retry_s=every_s)
        self._led = False
        self._letters_until = 0.0
        self.history = History()
        self.last = Reading(0.0)
        # Functions that are called after each reading. Their argument is the time of the reading.
        self.after: list[Callable[[float], Awaitable[None]]] = []
        # Functions that are called when this router stops leading.
        self.when_not_leading: list[Callable[[], None]] = []

    def start(self) -> None:
        """Start the loop."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop, and close the file."""
        await self._loop.stop()
        self._file.close()

    @property
    def leads(self) -> bool:
        """Return True if this router leads."""
        return self._leads()

    @property
    def reads(self) -> bool:
        """Return True if this router leads and has read the traffic."""
        return self._led and self.last.at > 0

    def endpoint(self, name: str) -> Endpoint | None:
        """Return the endpoint of the desired state with this name, or None."""
        return next((each for each in self.endpoints() if each.name == name), None)

    def endpoints(self) -> list[Endpoint]:
        """Return the endpoints of the desired state."""
        return self._registry.desired.endpoints if self._registry.desired is not None else []

    def statuses_of(self, endpoint: Endpoint) -> list[dict[str, Any]]:
        """Return the last known statuses of an endpoint's Deployments."""
        names = deployments_of(endpoint)
        return [dict(self.last.statuses[name]) for name in names if name in self.last.statuses]

    async def _step(self) -> float:
        if not self._leads():
            if self._led:
                self._led = False
                for end in self.when_not_leading:
                    end()
            return min(STANDBY_S, self._every_s)
        if self._registry.desired is None:
            # The desired state is not known yet: _read() would find no Endpoints, and delete all history.
            return min(STANDBY_S, self._every_s)
        if not self._led:
            await self._begin()
        try:
            await self._read()
        except (StoreUnavailable, Unavailable) as error:
            log.warning("the traffic of endpoints could not be read", extra={"problem": error.message})
        return self._every_s

    async def _begin(self) -> None:
        self._readings, history = Readings(), History()
        now = time.time()
        self._letters_until = now
        try:
            # The file can hold 100,000 windows of one minute. A thread reads them without blocking the event
            # loop.
            closed = await asyncio.to_thread(lambda: history.restore(self._file.windows(now)))
            await asyncio.to_thread(self._file.add, closed, now)
        except (Unavailable, ValueError) as error:  # a damaged file must not stop the watch
            log.warning("the history of endpoints could not be read", extra={"problem": str(error)})
        self.history = history
        self._led = True

    async def _read(self) -> None:
        endpoints = self.endpoints()
        now = time.time()
        names = [each.name for each in endpoints]
        self.last = Reading(
            now,
            await self._store.traffic(),
            (await self._store.gateways()).reports,
            await self._store.replicas(),
            await self._store.statuses(),
            endpoints,
            self._new_letters(now),
            await self._store.count_callers(names, self.day_s, now),
        )
        if not self._leads():
            return  # this process may have been suspended; do not overwrite the data of a new leader
        spans = self._readings.spans(self.last)
        objectives = {each.name: each.slo for each in endpoints}
        for name, window in spans.items():
            slo = objectives[name]
            if slo is not None and slo.latency_ms is not None:
                window.slow = window.slower_than(slo.latency_ms / 1e3)
        closed = self.history.add(spans)
        self.history.keep(set(names))
        if closed:
            await asyncio.to_thread(self._file.add, closed, now)
        for call in self.after:
            await call(now)

    def _new_letters(self, now: float) -> dict[str, int]:
        found: dict[str, int] = {}
        try:
            new = [name for at, name in self._letters() if self._letters_until < at <= now]
        except Unavailable:  # the journal is not loaded yet; the next reading counts the letters
            return found
        self._letters_until = now
        for name in new:
            found[name] = found.get(name, 0) + 1
        return found

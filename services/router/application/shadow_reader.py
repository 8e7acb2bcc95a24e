"""Read the gateways' counts of shadow traffic once a second, and add them up.

Every router reads the counts. Only the leader writes the sums to a file in the state folder. After a shadow
has ended, its sums remain until the endpoint gets another shadow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from services.router.adapters import shared_file
from services.router.adapters.registry_cache import RegistryCache
from services.router.application.leadership import Leadership
from services.router.domain import shadow_report
from services.router.domain.shadow_watch import ShadowWatch
from services.router.domain.table import Table, shadow_key
from tidegate.kernel import telemetry
from tidegate.kernel.protocol.models import Endpoint, unfit_for_shadow
from tidegate.kernel.repeating_task import RepeatingTask
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

TICK_S = 1.0


class ShadowReader:
    """One of the router's loops. It adds up the counts of each endpoint's shadow."""

    def __init__(
        self,
        store: Store,
        registry: RegistryCache,
        leadership: Leadership,
        disk: Path,
        table: Callable[[], Table | None],
        relist: Callable[[], None],
    ) -> None:
        """``table`` returns the published route table. ``relist`` makes the router read the registry now."""
        self._store = store
        self._registry = registry
        self._leadership = leadership
        self._disk = disk
        self._table = table
        self._relist = relist
        self._loop = RepeatingTask("shadows", self._step, retry_s=TICK_S)
        self._watches: dict[str, ShadowWatch] = {}

    def start(self) -> None:
        """Start the loop."""
        self._load()
        self._loop.start()

    async def stop(self) -> None:
        """Stop the loop."""
        await self._loop.stop()

    def shown(self, endpoint: Endpoint) -> dict[str, Any]:
        """Return an endpoint's shadow and its report, for JSON. Without a shadow, return the last report."""
        shadow = endpoint.shadow
        found: dict[str, Any] = {
            "endpoint": endpoint.name,
            "shadow": shadow.model_dump(mode="json") if shadow is not None else None,
            "problem": self._problem(endpoint),
            "report": None,
        }
        watch = self._watches.get(endpoint.name)
        if watch is not None and (shadow is None or watch.key == shadow_key(shadow)):
            found["report"] = shadow_report.report(watch.total())
        return found

    def _problem(self, endpoint: Endpoint) -> str:
        """Return why the shadow gets no copies of requests; empty if it gets copies or does not exist."""
        if endpoint.shadow is not None and (unfit := self._unfit(endpoint.shadow.deployment)):
            return f"{endpoint.shadow.deployment} {unfit}"
        table = self._table()
        entry = table["endpoints"].get(endpoint.name) if table is not None else None
        if endpoint.shadow is None or entry is None or entry["shadow"] is not None:
            return ""
        return (
            f"{endpoint.shadow.deployment} gets no copies: the registry does not list its version, or the "
            "endpoint is not allowed to use the Deployment's region"
        )

    def _unfit(self, name: str) -> str | None:
        """Return why a Deployment cannot be a shadow, as the end of a sentence. None: no reason is known."""
        desired = self._registry.desired
        assert desired is not None
        runs = next(((d.model, d.version) for d in desired.deployments if d.name == name), None)
        version = next((each for each in desired.versions if (each.model, each.number) == runs), None)
        return None if version is None else unfit_for_shadow(version)

    async def _step(self) -> float:
        endpoints = self._registry.desired.endpoints if self._registry.desired is not None else []
        with_shadow = [each for each in endpoints if each.shadow is not None]
        if not with_shadow:
            return TICK_S
        with contextlib.suppress(StoreUnavailable):
            view = await self._store.gateways()
            for endpoint in with_shadow:
                assert endpoint.shadow is not None
                key = shadow_key(endpoint.shadow)
                watch = self._watches.get(endpoint.name)
                if watch is None or watch.key != key:
                    watch = self._watches[endpoint.name] = ShadowWatch(key)
                watch.observe(endpoint.name, view.reports)
            if self._leadership.leads:
                self._save({each.name for each in endpoints})
                await self._end_late(with_shadow)
        return TICK_S

    async def _end_late(self, endpoints: list[Endpoint]) -> None:
        """End the expired shadows in the registry. The gateways have already stopped copying."""
        now = datetime.now(UTC)
        late = [
            each
            for each in endpoints
            if each.shadow is not None and each.shadow.until is not None and each.shadow.until <= now
        ]
        for endpoint in late:
            await self._registry.end_shadow(endpoint)
        if late:
            self._relist()

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            document = orjson.loads(self._disk.read_bytes())
            self._watches = {name: ShadowWatch.from_json(each) for name, each in document.items()}

    def _save(self, existing: set[str]) -> None:
        self._watches = {name: watch for name, watch in self._watches.items() if name in existing}
        document = {name: watch.to_json() for name, watch in self._watches.items()}
        try:
            shared_file.replace(self._disk, orjson.dumps(document))
        except OSError as error:  # a full disk must not stop the reading
            log.warning(
                "the counts of shadow traffic could not be written to their file",
                extra={"problem": str(error)},
            )

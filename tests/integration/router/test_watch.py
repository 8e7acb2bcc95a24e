"""The watch of endpoints on a real store: the gateways' totals and callers become a history that is kept."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
import pytest

from services.gateway.adapters.traffic_publisher import TrafficPublisher
from services.gateway.domain.traffic_counts import TrafficCounter
from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.watch_file import WatchFile
from services.router.application.endpoint_watch import EndpointWatch
from services.router.domain.watch.history import History
from services.router.domain.watch.window import Window
from tidegate.kernel.store import Store

pytestmark = pytest.mark.integration


@pytest.fixture
async def watching(registry, store: Store, tmp_path) -> AsyncIterator[Callable[..., Any]]:
    """Start watches on one state folder; those that run are stopped after the test."""
    async with AsyncExitStack() as stack:
        cache = RegistryCache(registry.url, "token", tmp_path / "intention.json")
        stack.push_async_callback(cache.close)
        await cache.refresh()

        async def started(letters: Callable[[], Any] = list) -> EndpointWatch:
            file = WatchFile(tmp_path / "watch.db")
            found = EndpointWatch(store, cache, lambda: True, file, letters, every_s=0.02, day_s=86_400)
            found.start()
            stack.push_async_callback(found.stop)
            return found

        yield started


async def test_traffic_becomes_a_history_with_callers_and_dead_letters(registry, store, watching, until):
    name = registry.name
    counter = TrafficCounter()
    letters: list[tuple[float, str]] = []
    publisher = TrafficPublisher(store, "one", counter.report)
    watch = await watching(lambda: letters)
    await until(lambda: watch.history.endpoints.get(name), "the watch reads")
    counter.add(name, f"{name}-v1", np.full((50, 6), 0.01))
    publisher.seen([("alice", name), ("bob", name), ("alice", name)])
    letters.append((time.time(), f"{name}-v1"))
    publisher.start()

    def recent():
        return watch.history.of(name).recent(60, time.time())

    await until(lambda: recent().answered == 50 and recent().callers == 2 and recent().dead == 1)
    await publisher.stop()
    counter.add(name, f"{name}-v1", np.full((5, 6), 0.01))
    await publisher.stop()  # the last totals stay for a minute
    await until(lambda: recent().answered == 55)


async def test_the_past_is_there_after_a_restart(registry, store, watching, until, tmp_path):
    minute, before = time.time() // 60 * 60 - 600, History()
    file = WatchFile(tmp_path / "watch.db")
    for at in (minute, minute + 60, minute + 120):
        file.add(before.add({registry.name: Window(at, at + 60, outcomes={"ok": 7})}), time.time())
    file.close()
    watch = await watching()
    await until(lambda: watch.last.at)
    found = watch.history.of(registry.name).between(minute, minute + 600)
    assert found.answered == 14  # the last minute was not closed

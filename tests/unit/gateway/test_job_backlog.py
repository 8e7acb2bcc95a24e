"""The estimate of the number of queued jobs."""

from __future__ import annotations

import asyncio

import pytest

from services.gateway.application.jobs.backlog import BacklogEstimate
from tidegate.kernel.protocol.jobs import JobLoad
from tidegate.kernel.store import StoreUnavailable

pytestmark = pytest.mark.unit


class Store:
    def __init__(self):
        self.loads = {}
        self.reads = 0
        self.down = False
        self.open = asyncio.Event()
        self.open.set()

    async def read(self):
        self.reads += 1
        await self.open.wait()
        if self.down:
            raise StoreUnavailable("away")
        return self.loads


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


async def test_jobs_accepted_since_the_last_read_are_counted():
    store, clock = Store(), Clock()
    waiting = BacklogEstimate(store.read, clock)
    store.loads = {"a": JobLoad(waiting=5, running=2)}
    assert [await waiting.ahead("a") for _ in range(3)] == [5, 6, 7]
    assert await waiting.ahead("b") == 0
    assert store.reads == 1


async def test_the_backlog_is_read_again_now_and_then():
    store, clock = Store(), Clock()
    waiting = BacklogEstimate(store.read, clock)
    assert await waiting.ahead("a") == 0
    store.loads = {"a": JobLoad(waiting=9)}
    clock.now += 3
    assert await waiting.ahead("a") == 9


async def test_accepted_jobs_still_count_while_the_backlog_is_read():
    store, clock = Store(), Clock()
    waiting = BacklogEstimate(store.read, clock)
    assert [await waiting.ahead("a") for _ in range(3)] == [0, 1, 2]
    store.open.clear()
    clock.now += 1
    assert [await waiting.ahead("a") for _ in range(2)] == [3, 4]
    await asyncio.sleep(0)
    assert await waiting.ahead("a") == 5, "the read has begun and is not over"
    store.loads = {"a": JobLoad(waiting=5)}
    store.open.set()
    while await waiting.ahead("b") is None or store.reads < 2 or waiting._reading is not None:
        await asyncio.sleep(0)
    assert await waiting.ahead("a") == 6, "five were in the store, and the sixth was accepted during the read"


async def test_the_backlog_is_unknown_while_the_store_is_away():
    store, clock = Store(), Clock()
    waiting = BacklogEstimate(store.read, clock)
    store.down = True
    assert await waiting.ahead("a") is None
    store.down = False
    clock.now += 3
    assert await waiting.ahead("a") == 0

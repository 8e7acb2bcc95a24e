"""What the gateway asks of the store of jobs beside the jobs themselves."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.kernel.store import JobStore, watch

pytestmark = pytest.mark.integration


async def test_watching_goes_on_after_a_time_in_which_nobody_watched(store, monkeypatch):
    monkeypatch.setattr(watch, "PING_S", 0.02)
    async with store.watch().changes(b"a" * 16):
        pass
    await asyncio.sleep(0.2)  # pings, while nothing is subscribed
    async with store.watch().changes(b"b" * 16):
        pass


async def test_many_reads_at_once_wait_for_each_other(store: JobStore):
    found = await asyncio.gather(*(store.get(n.to_bytes(16, "big")) for n in range(500)))
    assert found == [None] * 500

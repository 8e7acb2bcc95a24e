"""The gateway's subscriptions and reads at the store of jobs."""

from __future__ import annotations

import asyncio

import pytest

from tidegate.kernel.store import JobStore, watch

pytestmark = pytest.mark.integration


async def test_watching_works_again_after_a_pause(store, monkeypatch):
    monkeypatch.setattr(watch, "PING_S", 0.02)
    async with store.watch().changes(b"a" * 16):
        pass
    await asyncio.sleep(0.2)  # pings while there is no subscription
    async with store.watch().changes(b"b" * 16):
        pass


async def test_concurrent_reads_share_a_call(store: JobStore):
    found = await asyncio.gather(*(store.get(n.to_bytes(16, "big")) for n in range(500)))
    assert found == [None] * 500

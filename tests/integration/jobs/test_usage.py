"""What jobs used is counted with their ends, once, and reported by one of many."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from services.gateway.adapters.store import job_usage as usage
from services.gateway.adapters.store.job_usage import JobUsageStore
from tidegate.kernel.protocol.usage import COUNTS, Subject

pytestmark = pytest.mark.integration


@pytest.fixture
async def used(jobs_url, redis) -> AsyncIterator[JobUsageStore]:
    found = JobUsageStore.connect(jobs_url)
    yield found
    await found.close()


def counts(**given: int) -> tuple[int, ...]:
    return tuple(given.get(name, 0) for name in COUNTS)


async def test_each_end_counts(store, way, used):
    mine = {"principal": "k1", "endpoint": "digits"}
    job = await way.running(**mine)
    for _ in range(2):
        assert await way.finish(job.id, 1, reply=b"12345", compute_us=900, used_us=300)
    await way.finished(state="failed", **mine)
    cancelled = await way.queued(**mine | {"endpoint": "letters"})
    await store.cancel(cancelled.id)
    await way.finished(principal="anonymous")
    await way.finished(principal="service")
    today = datetime.now(UTC).date()
    report = await used.take()
    assert report.counts == {
        Subject(today, "k1", "digits"): counts(requests=2, failed=1, compute_us=300, sent_bytes=5),
        Subject(today, "k1", "letters"): counts(requests=1, failed=1),
    }
    assert await used.take() is None, "somebody has it in hand"
    await way.finished(**mine)
    second = await used.take()
    assert second.counts == {Subject(today, "k1", "digits"): counts(requests=1)}
    assert second.incarnation != report.incarnation


async def test_what_nobody_settles_is_taken_again_as_the_same(way, used, redis, monkeypatch):
    await way.finished(principal="k1")
    lost = await used.take()
    monkeypatch.setattr(usage, "REPORT_MS", 0)
    await asyncio.sleep(0.002)
    assert await used.take() == lost
    await used.settle(lost)
    await asyncio.sleep(0.002)
    assert await used.take() is None
    assert not await redis.keys("tidegate:job:used*")

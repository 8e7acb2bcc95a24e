"""Leases, the sweep, retention: nothing accepted is lost, and what is over goes in time."""

from __future__ import annotations

import time

import pytest

from tidegate.kernel.protocol.jobs import Idempotency, Taken

pytestmark = pytest.mark.integration


def now_ms() -> int:
    return int(time.time() * 1e3)


def ids(jobs) -> list[bytes]:
    return [job.id for job in jobs]


async def test_what_the_broker_never_confirmed_is_stale(store, other, way, new):
    fresh = new()
    await store.accept(fresh)
    await way.queued()
    assert await store.stale(now_ms(), 10) == []
    later = now_ms() + 11_000
    assert ids(await store.stale(later, 10)) == [fresh.id]
    assert await store.claim_republish(fresh.id, 0, "accepting") is None, "it is not time yet"


async def test_one_of_two_sweepers_republishes(store, other, way, redis, new):
    fresh = new()
    await store.accept(fresh)
    await redis.zadd("tidegate:job:due", {fresh.id: now_ms() - 1})
    assert await store.claim_republish(fresh.id, 0, "queued") is None
    assert await store.claim_republish(fresh.id, 1, "accepting") is None
    before = now_ms()
    assert await store.claim_republish(fresh.id, 0, "accepting") == fresh.frame
    assert await other.claim_republish(fresh.id, 0, "accepting") is None
    assert before + 10_000 <= await redis.zscore("tidegate:job:due", fresh.id) <= now_ms() + 10_000
    await store.queued([fresh.id])
    assert await redis.zscore("tidegate:job:due", fresh.id) is None
    assert await way.take(fresh.id) == Taken("run", 1)
    assert await way.take(fresh.id) == Taken("drop", 1), "the gateway's own message, which came after all"


async def test_a_lease_keeps_a_running_job(store, way):
    job = await way.running("w1")
    assert not await store.lease(job.id, 1, "w2", now_ms() + 30_000)
    assert not await store.lease(job.id, 2, "w1", now_ms() + 30_000)
    assert await store.lease(job.id, 1, "w1", now_ms() + 30_000)
    assert await way.take(job.id, "w2", redelivered=True) == Taken("drop", 1), "the message of before"
    assert await way.take(job.id, "w1", redelivered=True) == Taken("drop", 1), "and to the same worker"
    assert await store.stale(now_ms(), 10) == []
    assert ids(await store.stale(now_ms() + 31_000, 10)) == [job.id]
    assert await store.claim_republish(job.id, 1, "running") is None, "the lease is good"
    await store.queued([job.id])
    assert ids(await store.stale(now_ms() + 31_000, 10)) == [job.id], "nobody looks away from a lease"
    assert await way.finish(job.id, 1)
    assert await store.stale(now_ms() + 31_000, 10) == []
    assert not await store.lease(job.id, 1, "w1", now_ms() + 30_000)


async def test_a_lease_that_lapses(store, way, redis):
    job = await way.running("w1")
    assert await store.lease(job.id, 1, "w1", now_ms() - 1)
    assert ids(await store.stale(now_ms(), 10)) == [job.id]
    assert await store.claim_republish(job.id, 1, "running") is not None
    await store.queued([job.id])
    assert await store.stale(now_ms() + 60_000, 10) == [], "its message is in the broker"
    assert await way.take(job.id, "w2", frame_attempt=1) == Taken("run", 2)
    assert not await store.lease(job.id, 1, "w1", now_ms() + 30_000), "the first worker lets it go"
    assert not await way.finish(job.id, 1)
    assert await way.finish(job.id, 2)


async def test_its_worker_was_only_slow(store, way):
    job = await way.running("w1")
    assert await store.lease(job.id, 1, "w1", now_ms() - 1)
    assert await store.claim_republish(job.id, 1, "running") is not None
    assert await store.lease(job.id, 1, "w1", now_ms() + 30_000)
    assert await way.take(job.id, "w2", frame_attempt=1) == Taken("drop", 1)
    assert await way.finish(job.id, 1)


async def test_a_lapsed_lease_of_what_must_not_run_twice(store, way):
    job = await way.running("w1", retry_safe=False)
    assert await store.lease(job.id, 1, "w1", now_ms() - 1)
    assert await store.claim_republish(job.id, 1, "running") is None
    assert (await way.job(job.id)).error["reason"] == "worker_lost"
    assert await store.stale(now_ms() + 60_000, 10) == []


async def test_a_lease_of_a_job_that_waits_at_a_worker(store, way):
    job = await way.queued()
    assert await store.lease(job.id, 0, "w1", now_ms() + 30_000)
    assert not await store.lease(job.id, 0, "w2", now_ms() + 30_000)
    assert await way.take(job.id, "w2", redelivered=True) == Taken("drop", 0)
    assert await store.lease(job.id, 0, "w1", now_ms() + 30_000)
    assert await way.take(job.id, "w1") == Taken("run", 1)
    assert await way.take(job.id, "w2", redelivered=True) == Taken("drop", 1), "the lease goes on"
    assert await store.lease(job.id, 1, "w1", now_ms() + 30_000)
    lapses = await way.queued()
    assert await store.lease(lapses.id, 0, "w1", now_ms() - 1)
    assert await store.claim_republish(lapses.id, 0, "queued") is not None
    await store.queued([lapses.id])
    assert await way.take(lapses.id, "w2") == Taken("run", 1)


async def test_after_a_gap_leases_count_as_good(store, way, redis, new):
    job, fresh = await way.running("w1"), new()
    await store.lease(job.id, 1, "w1", now_ms() - 1)
    await store.accept(fresh)
    await redis.zadd("tidegate:job:due", {fresh.id: now_ms() - 1})
    assert len(await store.stale(now_ms(), 10)) == 2
    await redis.hset("tidegate:job:swept", "last", now_ms() - 11_000)
    assert ids(await store.stale(now_ms(), 10)) == [fresh.id], "what was never confirmed cannot wait for that"
    assert ids(await store.stale(now_ms(), 10)) == [fresh.id]
    await redis.hset("tidegate:job:swept", "resumed", now_ms() - 16_000)
    assert len(await store.stale(now_ms(), 10)) == 2


async def test_retention(store, way, redis, new):
    old = [await way.finished(webhook="http://x/") for _ in range(5)]
    open_ = [await way.queued(), await way.running()]
    assert await store.retire(now_ms(), 60_000, 100, 10) == 0
    assert await store.retire(now_ms(), 60_000, 3, 10) == 2, "the oldest beyond the number"
    assert [job is None for job in await store.get_many(ids(old))] == [True, True, False, False, False]
    assert await store.retire(now_ms() + 60_001, 60_000, 100, 2) == 2
    assert await store.retire(now_ms() + 60_001, 60_000, 100, 2) == 1
    assert ids(await store.list()) == ids(open_)[::-1]
    counts = await store.counts()
    assert counts.ledger == {"accepted": 7, "succeeded": 5, "removed": 5}
    assert counts.ledger["accepted"] == sum(counts.states.values()) + counts.ledger["removed"]
    for job in open_:
        await store.cancel(job.id)
    assert await store.retire(now_ms() + 60_001, 60_000, 100, 10) == 2
    left = {key.decode() for key in await redis.keys("*")}
    assert left <= {"tidegate:job:ledger", "tidegate:job:deployments"}, "nothing of them stays"


async def test_an_idempotency_key_lives_as_long_as_its_job(store, way, new):
    key = Idempotency("k", b"a" * 32)
    job = await way.finished(idempotency=key)
    assert await store.accept(new(idempotency=key)) == (job.id, False)
    assert await store.retire(now_ms() + 1, 0, 100, 10) == 1
    assert (await store.accept(new(idempotency=Idempotency("k", b"b" * 32)))).fresh


async def test_webhooks_are_due_when_a_job_is_over(way, redis):
    hooked = await way.running(webhook="http://x/")
    await way.finished()
    assert await redis.zcard("tidegate:job:webhooks") == 0
    await way.finish(hooked.id, 1, "failed")
    assert await redis.zrange("tidegate:job:webhooks", 0, -1) == [hooked.id]
    assert await redis.zscore("tidegate:job:webhooks", hooked.id) <= now_ms()

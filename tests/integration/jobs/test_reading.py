"""Lists, counts, positions and notices."""

from __future__ import annotations

import asyncio

import pytest

from tests.conftest import PATIENCE_S
from tidegate.kernel.protocol.jobs import JobLoad
from tidegate.kernel.store import JobStore, StoreUnavailable
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import jobs_running

pytestmark = pytest.mark.integration


def ids(jobs) -> list[bytes]:
    return [job.id for job in jobs]


async def test_lists(store, way, new):
    assert await store.list() == []
    made = [await way.queued(age_ms=1000 - n, endpoint=f"e{n % 2}", principal=f"p{n % 3}") for n in range(12)]
    newest = ids(made)[::-1]
    assert ids(await store.list()) == newest
    assert ids(await store.list(limit=5)) == newest[:5]
    assert ids(await store.list(limit=5, before=newest[4])) == newest[5:10]
    assert ids(await store.list(limit=5, before=newest[-1])) == []
    assert ids(await store.list(endpoint="e1")) == newest[0::2]
    assert ids(await store.list(endpoint="e1", principal="p0")) == [newest[2], newest[8]]
    assert ids(await store.list(endpoint="e1", principal="p0", limit=1)) == [newest[2]]
    assert await store.list(principal="nobody") == []
    assert len(await store.list(deployment="digits-v1", state="queued")) == 12
    await store.cancel(newest[2])
    assert ids(await store.list(state="cancelled")) == [newest[2]]
    batched = await way.queued(batch="b7", line=3)
    assert ids(await store.list(batch="b7")) == [batched.id]


async def test_a_list_looks_at_a_bounded_number_at_a_time(store, new):
    jobs = [
        new(age_ms=9000 - n, principal=("a", "b")[n % 2], endpoint=("x", "y")[n // 1200]) for n in range(2400)
    ]
    await asyncio.gather(*(store.accept(job) for job in jobs))
    found = await store.list(principal="a", endpoint="x", limit=1000)
    wanted = [job.id for job in jobs if job.principal == "a" and job.endpoint == "x"]
    assert ids(found) == wanted[::-1]
    pages, before = [], None
    while page := await store.list(endpoint="y", principal="b", limit=250, before=before):
        pages += ids(page)
        before = page[-1].id
    assert pages == [job.id for job in jobs if job.principal == "b" and job.endpoint == "y"][::-1]


async def test_counts(store, way):
    counts = await store.counts()
    assert (counts.unfinished, counts.deployments, counts.ledger) == (0, {}, {})
    await way.queued(deployment="a")
    await way.queued(deployment="a", level="low")
    await way.running(deployment="a")
    await way.running(deployment="b")
    await way.finished(deployment="c")
    await store.acknowledged("g1", 3)
    await store.acknowledged("g1", 5)
    counts = await store.counts()
    assert counts.deployments == {"a": JobLoad(2, 1), "b": JobLoad(0, 1)}
    assert {state: count for state, count in counts.states.items() if count} == {
        "queued": 2,
        "running": 2,
        "succeeded": 1,
    }
    assert counts.ledger == {"accepted": 5, "succeeded": 1}
    assert counts.acknowledged == {"g1": 5}


async def test_positions(store, way):
    low = [await way.queued(level="low", age_ms=100 - n) for n in range(3)]
    assert [await store.position(job) for job in low] == [0, 1, 2]
    for _ in range(20):
        await way.queued(level="high")
    assert [await store.position(job) for job in low] == [0, 17, 22]
    await way.take(low[1].id)
    assert await store.position(low[1]) == 0
    assert await store.position(low[2]) == 17


async def test_notices(store, other, way, new):
    fresh = new()
    await store.accept(fresh)
    async with store.watch().changes(fresh.id) as notices, store.watch().changes(fresh.id) as others:
        seen = []
        await other.queued([fresh.id])
        async with asyncio.timeout(PATIENCE_S):
            async for _ in notices:
                seen.append((await store.get(fresh.id)).state)
                if seen[-1] == "queued":
                    await way.take(fresh.id)
                elif seen[-1] == "running":
                    await way.finish(fresh.id, 1)
                else:
                    break
            assert seen == ["queued", "running", "succeeded"]
            await anext(others)
    assert store.watch() is store.watch()


async def test_watching_again_and_again(store, other, way):
    """Subscriptions of one job that end and begin at once do not undo each other."""
    job = await way.queued()
    for _ in range(50):
        async with store.watch().changes(job.id):
            pass
    async with store.watch().changes(job.id) as notices:
        await other.cancel(job.id)
        async with asyncio.timeout(PATIENCE_S):
            await anext(notices)


async def test_a_store_that_is_away(tmp_path, new):
    """Everything says so; with its data back, everything goes on, and watchers are told to look."""
    (port,) = free_ports(1)
    with jobs_running(tmp_path / "v", port=port) as url:
        store = JobStore.connect(url)
        job = new()
        await store.accept(job)
        watching = store.watch().changes(job.id)
        notices = await watching.__aenter__()
    operations = (
        lambda: store.accept(new()),
        lambda: store.queued([job.id]),
        lambda: store.get(job.id),
        lambda: store.get_many([job.id]),
        lambda: store.list(),
        lambda: store.counts(),
        lambda: store.cancel(job.id),
        lambda: store.lease(job.id, 1, "w", 1),
        store.ping,
    )
    for operation in operations:
        with pytest.raises(StoreUnavailable):
            await operation()
    with pytest.raises(StoreUnavailable):
        async with store.watch().changes(b"x" * 16):
            pass
    with jobs_running(tmp_path / "v", port=port):
        async with asyncio.timeout(PATIENCE_S):
            await anext(notices)
        found = await store.get(job.id)
        assert found is not None
        assert found.state == "accepting", "it was on disk"
        await watching.__aexit__(None, None, None)
    await store.close()

"""The lease of the leading router: one holder, rising epochs, outages and loss of the store."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import orjson
import pytest

from services.router.adapters import process_identity
from services.router.application.leadership import Leadership
from tidegate.kernel.store import Store
from tidegate.kernel.store.leader import LeaderStore
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import jobs_running

pytestmark = pytest.mark.integration

# Long enough for a busy machine to renew it: no test waits for its end but those of a short one.
LEASE_S, SHORT_S = 60.0, 0.3


@pytest.fixture
async def start(jobs_url, redis) -> AsyncIterator[Callable[..., Any]]:
    """Start to claim the lease, and stop after the test."""
    async with AsyncExitStack() as stack:

        async def started(
            name: str, url: str = jobs_url, lease_s: float = LEASE_S, **more: Any
        ) -> Leadership:
            found = Leadership(LeaderStore.connect(url), name, lease_s=lease_s, **more)
            found.start()
            stack.push_async_callback(found.stop)
            return found

        yield started


async def test_one_of_two_leads(start, until):
    a = await start("a")
    await until(lambda: a.leads)
    b = await start("b")
    await until(lambda: b.holder == "a")
    assert (a.leads, b.leads) == (True, False)
    assert b.why_not == "Router a leads; this one is on standby."


async def test_a_normal_stop_hands_over_with_a_greater_epoch(start, until):
    a = await start("a")
    await until(lambda: a.leads)
    first = a.epoch
    await a.stop()
    b = await start("b")
    await until(lambda: b.leads)
    assert b.epoch > first


async def test_a_leader_that_does_not_renew_is_replaced(start, redis, jobs_url, until):
    store = LeaderStore.connect(jobs_url)
    gone = await store.claim("gone", SHORT_S, 0)
    b = await start("b")
    await until(lambda: b.leads)
    assert b.epoch > gone.epoch
    assert (await store.claim("gone", SHORT_S, 0)).holder == "b", "the former leader gets the new holder"
    await store.close()


async def test_the_lease_of_a_dead_process_is_taken_at_once(start, jobs_url, until):
    store = LeaderStore.connect(jobs_url)
    killed = await store.claim("killed", LEASE_S, 0)
    b = await start("b", is_dead=lambda name: name == "killed")
    await until(lambda: b.leads)
    assert b.epoch > killed.epoch
    c = await start("c", is_dead=lambda _: False)
    await until(lambda: c.holder == "b")
    await store.close()


def test_a_name_shows_whether_its_process_is_dead():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        mine = process_identity.own("abc")
        lives = mine.replace(f":{os.getpid()}:", f":{other.pid}:")
        assert not process_identity.is_dead(lives)
    assert process_identity.is_dead(lives)
    assert process_identity.is_dead(mine), "another process had this name before"
    assert not process_identity.is_dead(lives.partition("@")[0] + "@elsewhere-1"), "its pid says nothing here"
    assert not process_identity.is_dead("garbage")


async def test_a_process_that_slept_must_claim_the_lease_again(start, until):
    a = await start("a")
    await until(lambda: a.leads)
    a._until = 0.0  # as after a stop of the process that was longer than the lease
    assert not a.leads


async def test_epochs_rise_when_the_store_has_lost_them(start, redis, until):
    a = await start("a")
    await until(lambda: a.leads)
    first = a.epoch
    await a.stop()
    await redis.flushall()
    b = await start("b", seen=first + 10**9)  # as after a clock that was set back
    await until(lambda: b.leads)
    assert b.epoch > first + 10**9


async def test_the_leader_continues_during_a_store_outage(tmp_path, start, until):
    """No other router can take the lease. Afterwards the epoch is the same, because it was on disk."""
    (port,) = free_ports(1)
    with jobs_running(tmp_path, port=port) as url:
        a = await start("a", url, lease_s=SHORT_S)
        await until(lambda: a.leads)
        epoch = a.epoch
    await until(lambda: a._away)
    await asyncio.sleep(2 * SHORT_S)
    assert a.leads
    with jobs_running(tmp_path, port=port):
        await until(lambda: not a._away)
        await until(lambda: a.leads)
        assert a.epoch >= epoch
        await a.stop()


async def test_a_new_router_does_not_lead_during_a_store_outage(start, until):
    (port,) = free_ports(1)
    a = await start("a", f"redis://127.0.0.1:{port}/0")
    await until(lambda: a._away)
    assert not a.leads
    assert a.why_not == "No router leads yet: the store of jobs does not answer."


async def test_overtaken_by_a_greater_epoch_elsewhere(start, until):
    """The store of jobs was emptied and the clock set back: the leader takes a greater epoch."""
    a = await start("a")
    await until(lambda: a.leads)
    met = a.epoch + 10**9
    a.overtaken(met)
    assert not a.leads
    await until(lambda: a.leads)
    assert a.epoch > met


async def test_an_old_table_does_not_overwrite_a_newer_one(valkey_url):
    store = Store.connect(valkey_url)
    await store._redis.flushall()

    def table(epoch: int, n: int, **more: Any) -> bytes:
        return orjson.dumps({"epoch": f"{epoch:014d}", "n": n, "endpoints": more})

    for epoch, n, refused in ((5, 1, None), (5, 2, None), (5, 1, 5), (4, 9, 5), (5, 10, None), (5, 9, 5)):
        assert await store.publish_routes(table(epoch, n)) == refused, (epoch, n)
    assert await store.read_routes() == table(5, 10)
    assert await store.publish_routes(table(5, 10, a=1)) is None, "the leader may write its own again"
    assert await store.publish_routes(table(6, 1)) is None
    await store._redis.set("tidegate:routes", b"garbage")
    assert await store.publish_routes(table(1, 1)) is None
    await store.close()

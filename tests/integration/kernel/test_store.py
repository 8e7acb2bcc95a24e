"""The live facts: they expire, changes are notified, and an absent or empty store is not an answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.conftest import PATIENCE_S
from tidegate.kernel.protocol.presence import (
    GatewayLoad,
    GatewayReport,
    GatewayView,
    ModelMetadata,
    ReplicaReport,
)
from tidegate.kernel.store import Store, StoreUnavailable, connection
from tidegate.kernel.store import live as store_module
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import valkey_running

pytestmark = pytest.mark.integration


@pytest.fixture
async def redis(valkey_url) -> AsyncIterator[Redis]:
    """Yield a client of the same server, without the store. The server is empty."""
    found = Redis.from_url(valkey_url)
    await found.flushall()
    yield found
    await found.aclose()


@pytest.fixture
async def store(valkey_url, redis) -> AsyncIterator[Store]:
    found = Store.connect(valkey_url)
    yield found
    await found.close()


def replica(name: str = "d-0-1", state="ready", **given) -> ReplicaReport:
    return ReplicaReport(name, "d", 1, "h", 7, state, **given)


def gateway(name: str = "g1", outstanding: int = 0) -> GatewayReport:
    return GatewayReport(name, time.time(), {"d": GatewayLoad(outstanding, 10, 5, 0)})


async def test_an_empty_store(store):
    await store.ping()
    assert await store.replicas() == []
    assert await store.read_routes() is None
    assert await store.statuses() == {}
    view = await store.gateways()
    assert (view.reports, view.missing) == ([], [])


async def test_replicas(store):
    ready, starting = replica("a", inflight=3, signature={"inputs": []}), replica("b", "starting")
    for report in (ready, starting):
        await store.report_replica(report)
    assert sorted(await store.replicas(), key=lambda r: r.replica) == [ready, starting]
    later = replica("a", "draining")
    await store.report_replica(later)
    await store.forget_replica("b")
    await store.forget_replica("never there")
    assert await store.replicas() == [later]


async def test_a_gateways_heartbeat_has_the_loads_of_one_moment(store):
    """A gateway goes on counting in the same loads while it writes its heartbeat."""
    report = gateway("g1", outstanding=1)
    writing = asyncio.create_task(store.report_gateway(report))
    await asyncio.sleep(0)
    report.deployments["d"].outstanding = 0
    await writing
    assert (await store.gateways()).reports[0].deployments["d"].outstanding == 1


async def test_many_replicas(store):
    await asyncio.gather(*(store.report_replica(replica(f"r{n}")) for n in range(60)))
    assert {r.replica for r in await store.replicas()} == {f"r{n}" for n in range(60)}


async def test_how_long_a_report_lives(store, redis):
    began = time.monotonic()
    await store.report_replica(replica("alive"))
    await store.report_replica(replica("broken", "failed", message="no such file"))
    await store.report_gateway(gateway("g1"))
    await store.publish_statuses({})
    await store.publish_routes(b"{}")
    limits = {
        store_module.REPLICA + "alive": 6_000,
        store_module.REPLICA + "broken": 120_000,
        store_module.GATEWAY + "g1": 3_000,
        store_module.STATUSES: 60_000,
    }
    for key, ttl_ms in limits.items():
        left = await redis.pttl(key)
        spent_ms = (time.monotonic() - began) * 1e3
        assert max(ttl_ms - spent_ms - 10, -2) <= left <= ttl_ms
    assert await redis.pttl(store_module.ROUTES) == -1, "the table stays"


async def test_a_silent_replica_is_forgotten(store, until, monkeypatch):
    monkeypatch.setattr(store_module, "REPLICA_TTL_MS", 30)
    await store.report_replica(replica())

    async def gone() -> bool:
        return await store.replicas() == []

    await until(gone)


async def test_a_silent_gateway_is_missing_before_it_is_gone(store, until, monkeypatch):
    monkeypatch.setattr(store_module, "GATEWAY_TTL_MS", 30)
    await store.report_gateway(gateway("silent", outstanding=7))
    monkeypatch.setattr(store_module, "GATEWAY_TTL_MS", 60_000)
    talks = gateway("talks")
    await store.report_gateway(talks)

    async def view_is(reports, missing) -> bool:
        view = await store.gateways()
        return (view.reports, view.missing) == (reports, missing)

    await until(lambda: view_is([talks], ["silent"]), "its load is unknown, not zero")
    back = gateway("silent", outstanding=1)
    await store.report_gateway(back)
    assert (await store.gateways()).missing == []
    monkeypatch.setattr(store_module, "GATEWAY_TTL_MS", 30)
    await store.report_gateway(back)
    await until(lambda: view_is([talks], ["silent"]))
    monkeypatch.setattr(store_module, "GATEWAY_GONE_S", 0.05)

    async def nobody_is_missing() -> bool:
        return (await store.gateways()).missing == []

    await until(nobody_is_missing, "after a long silence it is taken for gone")


async def test_a_gateway_that_signs_off_is_not_missing(store):
    await store.report_gateway(gateway("g1"))
    await store.report_gateway(gateway("g2"))
    await store.forget_gateway("g1")
    view = await store.gateways()
    assert ([r.incarnation for r in view.reports], view.missing) == (["g2"], [])


async def test_statuses(store):
    await store.publish_statuses({"a": {"desired": 1}, "b": {}})
    await store.publish_statuses({"a": {"desired": 2}})
    assert await store.statuses() == {"a": {"desired": 2}}


async def test_routes_are_kept(store):
    await store.publish_routes(b'{"n":1}')
    await store.publish_routes(b'{"n":2}')
    assert await store.read_routes() == b'{"n":2}'


async def test_watchers_are_woken_by_each_publication(store, valkey_url, until):
    other = Store.connect(valkey_url)
    seen: list[bytes | None] = []

    async def watch() -> None:
        async for _ in other.watch_routes():
            seen.append(await other.read_routes())  # noqa: PERF401 - read as they come

    watcher = asyncio.create_task(watch())

    async def woken(table: bytes) -> bool:
        await store.publish_routes(table)  # again and again: the subscription may not be there yet
        return table in seen

    await until(lambda: woken(b"1"))
    count = len(seen)
    await store.publish_routes(b"2")
    await until(lambda: b"2" in seen)
    assert len(seen) > count
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    await other.close()


async def _ask(store: Store) -> dict:
    return {
        "ping": store.ping,
        "publish_routes": lambda: store.publish_routes(b"{}"),
        "read_routes": store.read_routes,
        "report_replica": lambda: store.report_replica(replica()),
        "forget_replica": lambda: store.forget_replica("a"),
        "replicas": store.replicas,
        "report_gateway": lambda: store.report_gateway(gateway()),
        "forget_gateway": lambda: store.forget_gateway("g1"),
        "gateways": store.gateways,
        "publish_statuses": lambda: store.publish_statuses({}),
        "statuses": store.statuses,
        "watch_routes": lambda: anext(store.watch_routes()),
    }


async def test_a_store_that_is_away(tmp_path):
    """Every operation fails soon. After a restart of the empty store, all of them work again."""
    (port,) = free_ports(1)
    with valkey_running(tmp_path / "before", port=port) as url:
        store = Store.connect(url)
        await store.report_replica(replica())
        await store.publish_routes(b"{}")
        await store.report_gateway(gateway())
        watching = asyncio.ensure_future(anext(store.watch_routes()))
        await store.ping()
    with pytest.raises(StoreUnavailable):
        await watching

    async def fails(operation) -> float:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="The store does not answer: "):
            await operation()
        return time.monotonic() - started

    operations = await _ask(store)
    spent = dict(zip(operations, await asyncio.gather(*map(fails, operations.values())), strict=True))
    assert max(spent.values()) < PATIENCE_S, f"a refused connection is known at once: {spent}"

    with valkey_running(tmp_path / "after", port=port):
        for name, operation in operations.items():
            if name != "watch_routes":
                await operation()
        await store.forget_gateway("g1")
        assert await store.gateways() == GatewayView()
    await store.close()


@pytest.mark.parametrize("turns", range(16))
async def test_a_cancelled_operation_ends_its_task(store, turns):
    """A service cancels its loops when it stops, and waits for them, in any state."""
    for connected in (False, True):
        if connected:
            await store.ping()

        async def loop() -> None:
            while True:
                await store.read_routes()
                await asyncio.sleep(60)

        task = asyncio.create_task(loop())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=PATIENCE_S)
        task.cancel()
        assert done, "the cancellation was swallowed"


async def test_a_store_that_hangs(monkeypatch, until):
    """A store that accepts a connection and does not answer counts as away."""
    monkeypatch.setattr(connection, "OPERATION_TIMEOUT_S", 0.05)
    silent = await asyncio.start_server(lambda *_: asyncio.sleep(60), "127.0.0.1", 0)
    host, port = silent.sockets[0].getsockname()
    store = Store.connect(f"redis://{host}:{port}/0")
    with pytest.raises(StoreUnavailable):
        await store.replicas()
    silent.close()
    await store.close()


async def test_model_cards(store, redis):
    card = ModelMetadata({"name": "m", "input": []}, {"y": ["cat", "dog"]})
    await store.publish_model("digits-v1", card)
    assert await store.models(["digits-v1", "letters-v1"]) == {"digits-v1": card}
    assert await store.models([]) == {}
    assert await redis.ttl("tidegate:model:digits-v1") > 86_400, "a model that sleeps is still shown"
    await redis.set("tidegate:model:digits-v1", b'{"config": {}, "of_a_later_day": 1}')
    assert await store.models(["digits-v1"]) == {"digits-v1": ModelMetadata({})}


async def test_statistics_are_sums_over_all_who_add(store, valkey_url):
    other = Store.connect(valkey_url)
    for writer in (store, other, store):
        await writer.add_statistics("digits-v1", {"success.count": 2, "success.ns": 2**40}, 1_700_000_000_000)
    await store.add_statistics("digits-v1", {"fail.count": 1}, 0)
    assert await other.statistics(["digits-v1", "letters-v1"]) == {
        "digits-v1": {
            "success.count": 6,
            "success.ns": 3 * 2**40,
            "fail.count": 1,
            "last_inference": 1_700_000_000_000,
        },
        "letters-v1": {},
    }
    assert await store.statistics([]) == {}
    await other.close()

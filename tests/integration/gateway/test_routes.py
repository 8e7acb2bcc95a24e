"""The route table: read from the store and from disk, and kept if both fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import orjson
import pytest

from services.gateway.adapters.heartbeat import Heartbeat
from services.gateway.adapters.route_table import RouteTableCache
from services.gateway.domain.replica_fleet import ReplicaFleet
from tests.conftest import PATIENCE_S
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, ReplicaReport
from tidegate.kernel.store import Store
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import valkey_running

pytestmark = pytest.mark.integration


@pytest.fixture
async def store(valkey_url) -> AsyncIterator[Store]:
    found = Store.connect(valkey_url)
    await found._redis.flushall()
    yield found
    await found.close()


@pytest.fixture
def raw(table, deployment):
    """``raw(n, epoch)`` returns a table's bytes."""
    return lambda n, epoch="e": orjson.dumps({**table(deployment), "n": n, "epoch": epoch})


@pytest.fixture
async def routes(store, tmp_path) -> AsyncIterator[RouteTableCache]:
    found = RouteTableCache(store, tmp_path / "data" / "routes.json")
    yield found
    await asyncio.wait_for(found.stop(), PATIENCE_S)


def revision(routes: RouteTableCache) -> tuple[str, int] | None:
    return routes.table.revision if routes.table else None


async def test_from_the_store(store, routes, raw, until, tmp_path):
    await routes.start()
    assert routes.table is None
    assert routes.problem() == "No route table yet: the router has not published one."
    await store.publish_routes(raw(1))
    await until(lambda: revision(routes) == ("e", 1))
    assert routes.problem() is None
    assert (tmp_path / "data" / "routes.json").read_bytes() == raw(1)


async def test_only_newer_tables_are_used(store, routes, raw, until):
    await store.publish_routes(raw(5, "b"))
    await routes.start()
    assert revision(routes) == ("b", 5)
    for older in (
        raw(4, "b"),
        raw(9, "a"),
        raw(5, "b"),
        b"garbage",
        b"[]",
        b'{"epoch":"z"}',
        b'{"epoch":1,"n":2}',
    ):
        await store.publish_routes(older)
        await routes._refresh()
        assert revision(routes) == ("b", 5)
    await store.publish_routes(raw(1, "c"))
    await until(lambda: revision(routes) == ("c", 1))


async def test_an_emptied_store_changes_nothing(store, routes, raw):
    await store.publish_routes(raw(1))
    await routes.start()
    await store._redis.flushall()
    await routes._refresh()
    assert revision(routes) == ("e", 1)


async def test_a_restart_without_a_store(tmp_path, raw, until):
    """The table on disk is used until the store has a newer one."""
    (port,) = free_ports(1)
    (tmp_path / "routes.json").write_bytes(raw(3))
    store = Store.connect(f"redis://127.0.0.1:{port}/0")
    routes = RouteTableCache(store, tmp_path / "routes.json")
    await asyncio.wait_for(routes.start(), PATIENCE_S)
    assert revision(routes) == ("e", 3)
    with valkey_running(tmp_path / "valkey", port=port):
        await store.publish_routes(raw(4))
        await until(lambda: revision(routes) == ("e", 4))
        await asyncio.wait_for(routes.stop(), PATIENCE_S)
        await store.close()


async def test_a_broken_copy_on_disk_is_ignored(store, raw, tmp_path):
    (tmp_path / "routes.json").write_bytes(b"{")
    await store.publish_routes(raw(1))
    routes = RouteTableCache(store, tmp_path / "routes.json")
    await routes.start()
    assert revision(routes) == ("e", 1)
    await asyncio.wait_for(routes.stop(), PATIENCE_S)
    assert (tmp_path / "routes.json").read_bytes() == raw(1)


async def test_the_heartbeat_reports_load_and_reads_replicas(store, until):
    loads = {"d": GatewayLoad(3, 10, 7, 0)}
    shown: list[dict[str, GatewayLoad]] = []
    heartbeat = Heartbeat(store, "g1", 0.01, lambda: loads, shown.append)
    assert heartbeat.fleet("d") == ReplicaFleet(0, None)
    await store.report_replica(ReplicaReport("r", "d", 1, "h", 1, "ready", call_ms=20.0, batch_mean=2.0))
    await heartbeat.start()
    assert heartbeat.fleet("d") == ReplicaFleet(1, 10.0, 20.0)
    (report,) = (await store.gateways()).reports
    assert (report.incarnation, report.deployments) == ("g1", loads)
    await store.report_replica(ReplicaReport("q", "d", 1, "h", 1, "ready"))
    await until(lambda: heartbeat.fleet("d").ready == 2)
    await asyncio.wait_for(heartbeat.stop(), PATIENCE_S)
    view = await store.gateways()
    assert (view.reports, view.missing) == ([], [])


async def test_the_heartbeat_reads_the_load_of_other_gateways(store, until):
    await store.report_gateway(GatewayReport("g2", 1.0, {"d": GatewayLoad(outstanding=4)}))
    await store.publish_statuses({"d": {"conditions": [{"type": "Loaded", "ok": False, "message": "no"}]}})
    heartbeat = Heartbeat(store, "g1", 0.01, lambda: {"d": GatewayLoad(outstanding=9)}, lambda _: None)
    await heartbeat.start()
    await until(lambda: heartbeat.fleet("d") == ReplicaFleet(0, elsewhere=4, fault="no", gateways=2))
    await asyncio.wait_for(heartbeat.stop(), PATIENCE_S)


async def test_the_heartbeat_keeps_the_last_known_state(tmp_path, until):
    (port,) = free_ports(1)
    with valkey_running(tmp_path / "before", port=port) as url:
        store = Store.connect(url)
        await store.report_replica(ReplicaReport("r", "d", 1, "h", 1, "ready", call_ms=20.0))
        shown: list[dict[str, GatewayLoad]] = []
        heartbeat = Heartbeat(store, "g1", 0.01, dict, shown.append)
        await heartbeat.start()
    await until(lambda: heartbeat.store_down)
    assert heartbeat.fleet("d") == ReplicaFleet(1, 20.0, 20.0)
    with valkey_running(tmp_path / "after", port=port):
        await until(lambda: not heartbeat.store_down)
        await until(lambda: heartbeat.fleet("d") == ReplicaFleet(0, None))
        await asyncio.wait_for(heartbeat.stop(), PATIENCE_S)
        await store.close()

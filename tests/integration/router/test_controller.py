"""The router's main loop: the route table follows registry and workers, also during outages."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import httpx
import orjson
import pytest

from services.router.adapters.registry_cache import RegistryCache
from services.router.adapters.table_revision import TableRevision
from services.router.app import build
from services.router.application.controller import RouteController
from services.router.application.leadership import Leadership
from services.router.settings import RouterSettings
from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import EVENTS, REGISTRY_CHANGED, requests_queue
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.store import Store
from tidegate.kernel.store.leader import LeaderStore
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import valkey_running

pytestmark = pytest.mark.integration

FAST = {"interval_s": 0.02, "relist_s": 0.05}
LEASE_S = 60.0


class Router(RouteController):
    """A controller that releases its lease when it stops."""

    def start(self) -> None:
        self._leadership.start()
        super().start()

    async def stop(self) -> None:
        await super().stop()
        await self._leadership.stop()


@pytest.fixture
async def start(rabbitmq_url, registry, store, jobs_url, tmp_path) -> AsyncIterator[Callable[..., Any]]:
    """Start a router on one state folder, and stop it after the test."""
    async with AsyncExitStack() as stack:

        async def started(given: Store = store, **intervals: float) -> Router:
            name, revision = os.urandom(4).hex(), TableRevision(tmp_path / "revision.json")
            leadership = Leadership(LeaderStore.connect(jobs_url), name, lease_s=LEASE_S, seen=revision.epoch)
            found = Router(
                given,
                RegistryCache(registry.url, "token", tmp_path / "intention.json"),
                revision,
                leadership,
                rabbitmq_url,
                name,
                **{**FAST, **intervals},
            )
            found.start()
            stack.push_async_callback(found.stop)
            return found

        yield started


async def published(store: Store) -> dict[str, Any]:
    raw = await store.read_routes()
    found: dict[str, Any] = orjson.loads(raw) if raw else {}
    return found


async def serving(store: Store, registry) -> list[str]:
    endpoint = (await published(store)).get("endpoints", {}).get(registry.name, {"targets": []})
    return [target["deployment"] for target in endpoint["targets"]]


async def ready(store: Store, registry, number: int) -> None:
    name = f"{registry.name}-v{number}"
    await store.report_replica(ReplicaReport(f"{name}-0-1", name, 1, "h", 1, "ready"))


async def test_the_table_is_published(start, registry, store, until):
    controller = await start()
    table = await until(lambda: published(store))
    assert await serving(store, registry) == [f"{registry.name}-v1"]
    assert table["n"] == 1
    assert controller.problem() is None
    await ready(store, registry, 1)

    async def counted() -> bool:
        entry = (await published(store))["deployments"][f"{registry.name}-v1"]
        return entry["ready"] == 1

    await until(counted)
    assert (await published(store))["n"] > 1


async def test_a_refused_queue_delays_no_other_deployment(start, registry, store, rabbitmq_url, until):
    async def nothing(_) -> None:
        return

    async with Connection(rabbitmq_url, "test", nothing) as connection:
        channel = await connection.wait_up(PATIENCE_S)
        # The name comes first, and the queue is there with other arguments: the broker closes the channel.
        taken = replace(requests_queue(f"{registry.name}-v1"), arguments={"x-max-length": 7}, exchange=None)
        await channel.declare(taken)
        controller = await start()
        other = requests_queue(f"{registry.name}-v2").name

        async def declared() -> bool:
            try:
                await channel.publish(b"", routing_key=other, mandatory=True)
            except Unavailable:
                return False
            return True

        await until(declared)
        assert (await published(store))["deployments"][f"{registry.name}-v2"]["queue"] == other
        # Once the queue that was in the way is gone, its Deployment gets its own.
        await channel.delete(taken)

        async def mended() -> bool:
            try:
                await channel.publish(b"", routing_key=taken.name, mandatory=True)
            except Unavailable:
                return False
            return True

        await until(mended)
        assert controller.problem() is None


async def test_queues_exist_before_the_first_publish(start, registry, store, rabbitmq_url, until):
    await start()

    async def nothing(_) -> None:
        return

    async with Connection(rabbitmq_url, "test", nothing) as connection:
        channel = await connection.wait_up(PATIENCE_S)

        async def declared() -> bool:
            names = [requests_queue(f"{registry.name}-v{n}").name for n in (1, 2)]
            try:
                for name in names:
                    await channel.publish(b"", routing_key=name, mandatory=True)
            except Exception:
                return False
            return True

        await until(declared)


async def test_a_roll_over(start, registry, store, until):
    """Traffic moves when the new version has a replica. Then the endpoint is settled once."""
    await ready(store, registry, 1)
    registry.say(registry.endpoint([2], [1]))
    await start()
    await until(lambda: published(store))
    reads = registry.reads
    await until(lambda: registry.reads > reads + 2)
    assert await serving(store, registry) == [f"{registry.name}-v1"]
    assert registry.settled == []
    await ready(store, registry, 2)
    await until(lambda: registry.settled)
    assert registry.settled[0] == (registry.name, {"revision": 7})
    assert await serving(store, registry) == [f"{registry.name}-v2"]
    reads = registry.reads
    await until(lambda: registry.reads > reads + 2)
    assert len(registry.settled) == 1


async def test_a_change_is_noticed_at_once(start, registry, store, rabbitmq_url, until):
    """The change notification arrives long before the next regular reading."""
    controller = await start(relist_s=600.0, interval_s=600.0)
    await until(lambda: published(store))
    await controller.connection.wait_up(PATIENCE_S)
    registry.say(registry.endpoint([2]))

    async def nothing(_) -> None:
        return

    async with Connection(rabbitmq_url, "test", nothing) as connection:
        channel = await connection.wait_up(PATIENCE_S)
        await channel.publish(b"{}", exchange=EVENTS.name, routing_key=REGISTRY_CHANGED)

        async def moved() -> bool:
            return await serving(store, registry) == [f"{registry.name}-v2"]

        await until(moved)


async def test_an_emptied_store_is_filled_again(start, registry, store, until):
    await start()
    before = await until(lambda: published(store))
    await store._redis.flushall()
    assert await until(lambda: published(store)) == before


async def test_without_changes_the_revision_stays(start, registry, store, until):
    controller = await start()
    await until(lambda: published(store))
    reads = registry.reads
    await until(lambda: registry.reads > reads + 4)
    assert controller.table["n"] == 1


async def test_a_restart_without_the_registry(start, registry, store, until):
    """The table stays, with a greater revision than before."""
    first = await start()
    before = await until(lambda: published(store))
    await first.stop()
    await registry.stop()
    await store._redis.flushall()
    second = await start()
    after = await until(lambda: published(store))
    assert after["endpoints"] == before["endpoints"]
    assert (after["epoch"], after["n"]) > (before["epoch"], before["n"])
    assert second.problem() is None
    await registry.start()
    registry.say(registry.endpoint([2]))

    async def moved() -> bool:
        return await serving(store, registry) == [f"{registry.name}-v2"]

    await until(moved)


async def test_without_a_desired_state_there_is_no_table(start, registry, store, until):
    await registry.stop()
    controller = await start()
    await until(lambda: "The registry does not answer" in (controller.problem() or ""))
    assert await published(store) == {}
    assert controller.table is None


async def test_a_registry_with_broken_responses(start, registry, store, until):
    controller = await start()
    before = await until(lambda: published(store))
    registry.broken = True
    reads = registry.reads
    await until(lambda: registry.reads > reads + 2)
    assert await published(store) == before
    assert controller.problem() is None, "the last good desired state stays"


async def test_the_wrong_token(start, registry, store, until, tmp_path):
    wrong = RegistryCache(registry.url, "wrong", tmp_path / "other.json")
    await wrong.refresh()
    assert wrong.desired is None
    assert "401" in (wrong.problem or "")
    await wrong.close()


async def test_without_a_store(start, registry, tmp_path, until):
    (port,) = free_ports(1)
    store = Store.connect(f"redis://127.0.0.1:{port}/0")
    controller = await start(store)
    await until(lambda: controller.table and controller.store_problem)
    with valkey_running(tmp_path / "valkey", port=port):
        assert (await until(lambda: published(store)))["n"] == 1
        await until(lambda: controller.store_problem is None)
        await controller.stop()
        await store.close()


def test_the_epoch_is_kept(tmp_path):
    path = tmp_path / "data" / "revision.json"
    first = TableRevision(path)
    assert (first.epoch, first.n) == (0, 0)
    first.begin(17)
    first.advance()
    assert (first.text, first.n) == ("00000000000017", 1)
    assert (TableRevision(path).epoch, TableRevision(path).n) == (17, 0)
    path.write_bytes(b'{"epoch":"01764000000000","n":5}')  # as written before there were leases
    assert TableRevision(path).epoch == 1_764_000_000_000
    path.write_bytes(b"{")
    assert TableRevision(path).epoch == 0


async def test_the_http_routes(start, registry, store, rabbitmq_url, valkey_url, tmp_path, until):
    settings = RouterSettings(
        state_dir=tmp_path,
        service_token="token",
        amqp_url=rabbitmq_url,
        redis_url=valkey_url,
        jobs_url=valkey_url,
        registry_url=registry.url,
        route_interval_s=0.02,
    )
    app = build(settings)
    transport = httpx.ASGITransport(app)
    headers = {"Authorization": "Bearer token"}
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client,
    ):

        async def published_table() -> dict[str, Any] | None:
            answer = await client.get("/v1/routes")
            return answer.json() if answer.status_code == 200 else None

        table = await until(published_table)
        assert list(table["endpoints"]) == [registry.name]

        async def healthy() -> bool:
            return (await client.get("/health/ready")).status_code == 200

        await until(healthy)
        assert (await client.get("/v1/exceptions")).json() == {"items": []}
        assert (await client.get("/v1/exceptions?limit=0")).status_code == 400
        assert (await client.get("/v1/routes", headers={"Authorization": ""})).status_code == 401

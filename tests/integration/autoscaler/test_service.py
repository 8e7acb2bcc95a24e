"""Test the whole service with a real store and real processes: scale, heal, adopt, stand by."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from services.autoscaler.app import build
from services.autoscaler.domain.snapshot import Host, HostProbe
from services.autoscaler.settings import AutoscalerSettings
from tests.conftest import PATIENCE_S
from tidegate.kernel import tasks
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import EVENTS, REGISTRY_CHANGED, demand_key
from tidegate.kernel.protocol.models import Deployment, Override
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, ReplicaReport
from tidegate.kernel.store import Store

NAME, TOKEN = "digits-v1", "secret"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Registry:
    """A small registry with one Deployment and its override, which can be switched off."""

    def __init__(self, assign: Callable[..., Any]) -> None:
        self.port = free_port()
        self.deployment = assign(f"{NAME}-0-1", max_replicas=3).deployment
        self.version = assign(f"{NAME}-0-1").version
        self.overrides: list[dict[str, Any] | None] = []
        self.app = FastAPI()
        self.app.get("/v1/intention")(self.desired_state)
        self.app.patch("/v1/deployments/{name}/policy")(self.patch)
        self.app.put("/v1/deployments/{name}/override")(self.put_override)
        self.app.delete("/v1/deployments/{name}/override")(self.lift_override)

    def desired_state(self) -> dict[str, Any]:
        stored = [self.deployment.model_dump(mode="json")]
        return {"revision": 1, "versions": [self.version.model_dump(mode="json")], "deployments": stored}

    def patch(self, name: str, body: dict[str, Any]) -> Any:
        merged = {**self.deployment.model_dump(mode="json"), **body}
        try:
            self.deployment = Deployment.model_validate(merged)
        except ValidationError as error:
            document = {"error": str(error), "reason": "bad_request", "request_id": "r"}
            return JSONResponse(document, status_code=400)
        return self.deployment.model_dump(mode="json")

    def put_override(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        self.overrides.append({"name": name, **body})
        return {}

    def lift_override(self, name: str) -> dict[str, Any]:
        self.overrides.append(None)
        return {}

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        config = uvicorn.Config(self.app, port=self.port, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield
        finally:
            server.should_exit = True
            await serving


class Bench:
    """Autoscalers on one state folder, and the heartbeats of the workers that run."""

    def __init__(self, harness: Any, registry: Registry, redis_url: str, amqp_url: str) -> None:
        self.harness = harness
        self.registry = registry
        self.store = Store.connect(redis_url)
        self.outstanding = 0
        self.arrived = 0
        self.silent: set[str] = set()
        self.settings = AutoscalerSettings(
            state_dir=harness.state,
            redis_url=redis_url,
            jobs_url=redis_url,
            registry_url=f"http://127.0.0.1:{registry.port}",
            amqp_url=amqp_url,
            service_token=TOKEN,
            autoscaler_period_s=0.1,
            autoscaler_relist_s=0.2,
            autoscaler_down_window_s=0.5,
        )

    @asynccontextmanager
    async def autoscaler(self, room: HostProbe | None = None) -> AsyncIterator[httpx.AsyncClient]:
        app = build(self.settings, self.harness.launcher(), room)
        async with app.router.lifespan_context(app):
            transport = httpx.ASGITransport(app=app)
            headers = {"Authorization": f"Bearer {TOKEN}"}
            async with httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1", headers=headers
            ) as client:
                yield client

    async def heartbeats(self) -> None:
        while True:
            for folder in self.harness.folders():
                lock = folder / "lock"
                if folder.name not in self.silent and lock.is_file():
                    await self.store.report_replica(self.report(folder))
            load = {NAME: GatewayLoad(outstanding=self.outstanding, arrived=self.arrived)}
            await self.store.report_gateway(GatewayReport("g1", time.time(), load))
            await asyncio.sleep(0.1)

    def report(self, folder: Path) -> ReplicaReport:
        name, _, generation = folder.name.rsplit("-", 2)
        draining = (folder / "draining").exists()
        return ReplicaReport(
            replica=folder.name,
            deployment=name,
            generation=int(generation),
            host="h",
            pid=0,
            state="draining" if draining else "ready",
            call_ms=20.0,
            phases_ms={"launch": 10.0, "load": 20.0},
        )

    async def well(self, client: httpx.AsyncClient) -> bool:
        return (await client.get("/health/ready")).status_code == 200

    async def status(self, client: httpx.AsyncClient) -> dict[str, Any]:
        answer = await client.get(f"/v1/deployments/{NAME}")
        return answer.json() if answer.status_code == 200 else {"ready": 0, "replicas": []}

    async def one_is_published(self) -> bool:
        """Return whether the published status has one ready replica."""
        published: dict[str, Any] = await self.store.statuses()
        return bool(published[NAME]["ready"] == 1)

    async def until_ready(self, client: httpx.AsyncClient, count: int) -> list[str]:
        """Wait until exactly so many replicas exist and are ready, and return their names."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            status = await self.status(client)
            if status["ready"] == count == len(status["replicas"]):
                return [replica["replica"] for replica in status["replicas"]]
            assert time.monotonic() < deadline, status
            await asyncio.sleep(0.05)


@pytest.fixture
async def bench(
    processes: Any, assign: Callable[..., Any], valkey_url: str, rabbitmq_url: str
) -> AsyncIterator[Bench]:
    # A separate database, because gateways of other tests would count as missing here.
    bench = Bench(processes, Registry(assign), valkey_url.removesuffix("/0") + "/5", rabbitmq_url)
    beating = asyncio.create_task(bench.heartbeats())
    yield bench
    while not beating.done():  # the store's client can lose a cancellation
        beating.cancel()
        await asyncio.wait({beating}, timeout=0.2)
    for report in await bench.store.replicas():
        await bench.store.forget_replica(report.replica)
    await bench.store.forget_gateway("g1")
    await bench.store.close()


async def test_holds_scales_and_heals(bench: Bench, until: Callable[..., Awaitable[Any]]) -> None:
    async with bench.registry.serving(), bench.autoscaler() as client:
        assert await bench.until_ready(client, 1) == [f"{NAME}-0-1"]
        start = (await client.get(f"/v1/deployments/{NAME}/cold-starts")).json()["items"][0]
        assert start["phases_ms"] == {"launch": 10.0, "load": 20.0}
        assert 0 < start["total_ms"] < 10_000

        bench.outstanding = 40
        names = await bench.until_ready(client, 3)
        victim = int((bench.harness.state / "replicas" / names[1] / "lock").read_text())
        os.kill(victim, signal.SIGKILL)
        bench.silent.add(names[1])
        while f"{NAME}-1-2" not in await bench.until_ready(client, 3):
            await asyncio.sleep(0.02)
        assert bench.harness.processes(names[1]) == [], "the server that the dead worker left is ended"

        bench.outstanding = 0
        await bench.until_ready(client, 1)
        decisions = (await client.get("/v1/decisions", params={"deployment": NAME})).json()["items"]
        assert {(d["before"], d["after"]) for d in decisions} >= {(1, 3), (3, 1)}
        assert any("SIGKILL" in d["reason"] for d in decisions)
        # A round is published to the store after the API shows it.
        await until(bench.one_is_published)
        metrics = (await client.get("/metrics")).text
        assert f'tidegate_autoscaler_replacements_total{{cause="died",deployment="{NAME}"}} 1.0' in metrics
        assert await bench.well(client)


async def test_a_restart_without_the_registry_adopts_and_an_override_waits_for_it(bench: Bench) -> None:
    bench.outstanding = 40
    async with bench.registry.serving(), bench.autoscaler() as client:
        before = await bench.until_ready(client, 3)
    pids = [(bench.harness.state / "replicas" / name / "lock").read_text() for name in before]

    async with bench.autoscaler() as client:
        assert await bench.until_ready(client, 3) == before
        assert [(bench.harness.state / "replicas" / name / "lock").read_text() for name in before] == pids
        answer = await client.put(f"/v1/deployments/{NAME}/replicas", json={"replicas": 1, "ttl_s": 600})
        document = answer.json()
        assert (document["replicas"], document["runs"], document["held_by"]) == (1, 1, "autoscaler")
        await bench.until_ready(client, 1)
        unknown = await client.put("/v1/deployments/nothing/replicas", json={"replicas": 1})
        assert unknown.status_code == 404
        async with bench.registry.serving():
            while not bench.registry.overrides:
                await asyncio.sleep(0.02)
        [handed] = bench.registry.overrides
        assert handed is not None
        assert handed["replicas"] == 1
        assert 0 < handed["ttl_s"] < 600


class SmallHost:
    """A host with two cores that has room for four replicas."""

    async def read(self) -> Host:
        return Host(2.0, 8_192, 8_192)


async def test_an_override_of_hundreds_starts_what_the_maximum_and_the_host_allow(bench: Bench) -> None:
    bench.settings.autoscaler_replicas_per_core = 2.0
    path = f"/v1/deployments/{NAME}/replicas"
    async with bench.registry.serving(), bench.autoscaler(SmallHost()) as client:
        await bench.until_ready(client, 1)
        document = (await client.put(path, json={"replicas": 396})).json()
        assert (document["replicas"], document["runs"], document["bounded_by"]) == (396, 3, "maximum")
        assert "max_replicas is 3" in document["reason"]
        document = (await client.put(path, json={"replicas": 396, "force": True})).json()
        assert (document["runs"], document["bounded_by"]) == (4, "host")
        assert "the host is full: it has room for 4 of 396" in document["reason"]
        assert bench.registry.overrides[-1] == {"name": NAME, "replicas": 396, "force": True}
        # Every later autoscaler gets it from the registry.
        forced = Override(replicas=396, force=True)
        bench.registry.deployment = bench.registry.deployment.model_copy(update={"override": forced})
        await bench.until_ready(client, 4)
        why = (await client.get(f"/v1/deployments/{NAME}/why")).json()
        assert (why["rule"], why["desired"]) == ("host full", 4)
    async with bench.registry.serving(), bench.autoscaler(SmallHost()) as client:
        await bench.until_ready(client, 4)
        assert len(bench.harness.folders()) == 4


async def test_a_second_one_stands_by_and_takes_over(bench: Bench) -> None:
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(bench.registry.serving())
        leader = contextlib.AsyncExitStack()
        first = await leader.enter_async_context(bench.autoscaler())
        names = await bench.until_ready(first, 1)
        second = await stack.enter_async_context(bench.autoscaler())
        problems = (await second.get("/health/ready")).json()["problems"]
        assert problems["leader"].startswith("Standby")
        assert (await bench.status(second))["ready"] == 1, "it answers from what the leader published"
        assert (await second.post(f"/v1/replicas/{names[0]}/drain")).status_code == 503
        await leader.aclose()
        while not await bench.well(second):
            await asyncio.sleep(0.05)
        assert await bench.until_ready(second, 1) == names
        assert (await second.post(f"/v1/replicas/{names[0]}/drain")).status_code == 202
        while await bench.until_ready(second, 1) == names:
            await asyncio.sleep(0.05)


async def test_nothing_known_is_not_ready_and_starts_nothing(bench: Bench) -> None:
    async with bench.autoscaler() as client:
        await asyncio.sleep(0.5)
        answer = await client.get("/health/ready")
        assert answer.status_code == 503
        assert "registry" in answer.json()["problems"]["intention"]
        assert bench.harness.folders() == []
        assert (await client.get("/v1/deployments", headers={"Authorization": ""})).status_code == 401


async def test_a_demand_event_wakes_a_sleeping_model_and_a_registry_event_is_read_at_once(
    bench: Bench, assign: Callable[..., Any], rabbitmq_url: str, until: Callable[..., Awaitable[Any]]
) -> None:
    """The periods are long, so only the events can make it quick."""
    asleep = {"min_replicas": 0, "max_replicas": 1, "scale_to_zero_after_s": 0.1}
    async with bench.registry.serving():
        async with bench.autoscaler() as client:
            # It stays awake until the test has seen it. Otherwise it could end between two checks.
            await bench.until_ready(client, 1)
            bench.registry.deployment = assign(f"{NAME}-0-1", **asleep).deployment
            await bench.until_ready(client, 0)
        bench.settings.autoscaler_period_s = bench.settings.autoscaler_relist_s = 60.0
        async with bench.autoscaler() as client, Connection(rabbitmq_url, "test", declared) as connection:
            await until(lambda: bench.well(client))
            channel = await connection.wait_up(PATIENCE_S)
            hints = asyncio.create_task(repeated(channel, demand_key(NAME)))
            assert await bench.until_ready(client, 1) == [f"{NAME}-0-2"]
            await tasks.end(hints)
            bench.registry.deployment = assign(f"{NAME}-0-1", min_replicas=2, max_replicas=2).deployment
            changes = asyncio.create_task(repeated(channel, REGISTRY_CHANGED))
            await bench.until_ready(client, 2)
            await tasks.end(changes)


async def repeated(channel: Channel, routing_key: str) -> None:
    """Repeat the event every second, as gateways do while a request waits, because one may be lost."""
    while True:
        await channel.publish(b"{}", exchange=EVENTS.name, routing_key=routing_key)
        await asyncio.sleep(1.0)


async def declared(channel: Channel) -> None:
    await channel.declare(EVENTS)

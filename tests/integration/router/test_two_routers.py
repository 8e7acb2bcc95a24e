"""Two router processes on one state folder: one leads, and the other takes over after any failure."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.integration.router.conftest import TOKEN, SmallRegistry
from tidegate.kernel.store import Store, StoreUnavailable
from tidegate.stack.ports import free_ports
from tidegate.stack.standalone import jobs_running, valkey_running

pytestmark = pytest.mark.integration

# Longer than a busy machine keeps a process from renewing it.
LEASE_S = 3.0
# Starting Python and waiting for a lease takes its time on a busy machine.
PATIENCE_S = 120.0


class RouterProcess:
    """A router process like that of the stack."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        (self._port,) = free_ports(1)
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "services.router"],
                env={**env, "TIDEGATE_ROUTER_PORT": str(self._port)},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self._http = httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{self._port}", timeout=60.0, headers=headers
        )

    async def leads(self) -> bool | None:
        """Return whether the router says that it leads; None: it does not answer."""
        try:
            page = (await self._http.get("/metrics")).text
        except httpx.HTTPError:
            return None
        found = re.search(r"^tidegate_router_leads (\d)", page, re.M)
        return None if found is None else found[1] == "1"

    async def table(self) -> Any:
        answer = await self._http.get("/v1/routes")
        return answer.json()

    async def is_ready(self) -> bool:
        return (await self._http.get("/health/ready")).status_code == 200

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    async def close(self) -> None:
        await self._http.aclose()
        if self.process.poll() is None:
            self.process.kill()
            self.process.send_signal(signal.SIGCONT)
        self.process.wait()


class Pair:
    """Two routers, their stores and their registry."""

    def __init__(self, env: dict[str, str], folder: Path, registry: SmallRegistry, store: Store) -> None:
        self.env = env
        self._folder = folder
        self.registry = registry
        self.store = store
        self.routers: list[RouterProcess] = []

    def start(self) -> RouterProcess:
        found = RouterProcess(self.env, self._folder / f"router-{len(self.routers)}.log")
        self.routers.append(found)
        return found

    async def table(self) -> Any:
        try:
            raw = await self.store.read_routes()
        except StoreUnavailable:
            return None
        return orjson.loads(raw) if raw else None

    async def serving(self) -> list[str]:
        table = await self.table()
        return [t["deployment"] for t in table["endpoints"][self.registry.name]["targets"]] if table else []

    def move_to(self, number: int) -> str:
        """Change the desired state. Return the Deployment that should serve."""
        self.registry.say(self.registry.endpoint([number]))
        return f"{self.registry.name}-v{number}"


@pytest.fixture
async def pair(tmp_path, rabbitmq_url, valkey_url, jobs_url, registry, store) -> AsyncIterator[Pair]:
    env = environment(tmp_path, rabbitmq_url, valkey_url, jobs_url, registry)
    found = Pair(env, tmp_path, registry, store)
    yield found
    for router in found.routers:
        await router.close()


def environment(
    state: Path, amqp_url: str, redis_url: str, jobs_url: str, registry: SmallRegistry
) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return ours | {
        "TIDEGATE_STATE_DIR": str(state / "state"),
        "TIDEGATE_SERVICE_TOKEN": TOKEN,
        "TIDEGATE_AMQP_URL": amqp_url,
        "TIDEGATE_REDIS_URL": redis_url,
        "TIDEGATE_JOBS_URL": jobs_url,
        "TIDEGATE_REGISTRY_URL": registry.url,
        "TIDEGATE_ROUTE_INTERVAL_S": "0.05",
        "TIDEGATE_RELIST_INTERVAL_S": "0.1",
        "TIDEGATE_ROUTER_LEASE_S": str(LEASE_S),
    }


async def leader_of(pair: Pair, until) -> tuple[RouterProcess, RouterProcess]:
    """Wait for both routers. Return the leader and the other one."""
    first, second = pair.start(), pair.start()

    answers: list[bool | None] = []

    async def settled() -> bool:
        answers[:] = [await first.leads(), await second.leads()]
        return set(answers) == {True, False}

    await until(settled, patience_s=PATIENCE_S)
    return (first, second) if answers[0] else (second, first)


async def moved(pair: Pair, name: str, until) -> None:
    async def there() -> bool:
        return await pair.serving() == [name]

    await until(there, f"{name} serves", patience_s=PATIENCE_S)


async def test_one_leads_and_both_answer(pair, until):
    leader, other = await leader_of(pair, until)
    await moved(pair, pair.move_to(2), until)

    async def both_answer() -> bool:
        return await leader.table() == await other.table() == await pair.table()

    await until(both_answer, patience_s=PATIENCE_S)
    await until(other.is_ready, patience_s=PATIENCE_S)


async def test_the_leader_is_killed(pair, until, figure):
    leader, other = await leader_of(pair, until)
    await moved(pair, pair.move_to(2), until)
    before = await pair.table()
    leader.signal(signal.SIGKILL)
    leader.process.wait()
    killed_at = time.monotonic()
    await until(other.leads, patience_s=PATIENCE_S)
    took_s = time.monotonic() - killed_at
    figure(f"leading router killed: another on the same machine led {took_s:.1f} s later")
    await moved(pair, pair.move_to(1), until)
    assert (await pair.table())["epoch"] > before["epoch"]


async def test_a_killed_router_that_is_started_again_leads_at_once(pair, until):
    """No router waits for the lease of a dead process: this lease lasts ten times as long as the test."""
    pair.env["TIDEGATE_ROUTER_LEASE_S"] = str(10 * PATIENCE_S)
    first = pair.start()
    await until(first.leads, patience_s=PATIENCE_S)
    first.signal(signal.SIGKILL)
    first.process.wait()
    second = pair.start()
    await until(second.leads, patience_s=PATIENCE_S)
    await moved(pair, pair.move_to(2), until)


async def test_the_leader_stops_normally(pair, until):
    leader, other = await leader_of(pair, until)
    leader.signal(signal.SIGTERM)
    await until(other.leads, patience_s=PATIENCE_S)
    assert leader.process.wait(PATIENCE_S) == 0


async def test_the_leader_is_suspended_and_resumes_late(pair, until):
    """It does not overwrite its successor's table, and takes over again when that one dies."""
    sleeper, other = await leader_of(pair, until)
    await moved(pair, pair.move_to(2), until)
    sleeper.signal(signal.SIGSTOP)
    await until(other.leads, patience_s=PATIENCE_S)
    # The sleeper does not know of this; on waking it would publish what it compiled before.
    await moved(pair, pair.move_to(1), until)
    epoch = (await pair.table())["epoch"]
    sleeper.signal(signal.SIGCONT)

    async def settled() -> bool:
        assert (await pair.table())["epoch"] >= epoch
        return {await sleeper.leads(), await other.leads()} == {True, False}

    await until(settled, patience_s=PATIENCE_S)
    assert await pair.serving() == [f"{pair.registry.name}-v1"]
    other.signal(signal.SIGKILL)
    await until(sleeper.leads, patience_s=PATIENCE_S)
    await moved(pair, pair.move_to(2), until)
    assert (await pair.table())["epoch"] > epoch


async def test_both_stores_restart(tmp_path, rabbitmq_url, registry, until):
    """The live store loses everything, the store of jobs nothing: one router leads and the table is back."""
    live_port, jobs_port = free_ports(2)
    async with AsyncExitStack() as stack:
        live, jobs = f"redis://127.0.0.1:{live_port}/0", f"redis://127.0.0.1:{jobs_port}/0"
        store = Store.connect(live)
        stack.push_async_callback(store.close)
        found = Pair(environment(tmp_path, rabbitmq_url, live, jobs, registry), tmp_path, registry, store)
        with (
            valkey_running(tmp_path / "live", port=live_port),
            jobs_running(tmp_path / "jobs", port=jobs_port),
        ):
            leader, other = await leader_of(found, until)
            for router in (leader, other):
                stack.push_async_callback(router.close)
            await moved(found, found.move_to(2), until)
            before = await found.table()
        with valkey_running(tmp_path / "live", port=live_port):
            # The store of the jobs is still away: the last leader goes on.
            await moved(found, found.move_to(1), until)
            assert (await found.table())["epoch"] == before["epoch"]
            with jobs_running(tmp_path / "jobs", port=jobs_port):

                async def settled() -> bool:
                    return {await leader.leads(), await other.leads()} == {True, False}

                await until(settled, patience_s=PATIENCE_S)
                await moved(found, found.move_to(2), until)
                assert (await found.table())["epoch"] >= before["epoch"]
                for router in (leader, other):
                    await router.close()

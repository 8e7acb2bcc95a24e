"""Test the warm pool with the real broker and store. The test acts as the worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from services.autoscaler.adapters.history.decision_store import DecisionStore
from services.autoscaler.adapters.registry.client import RegistryClient
from services.autoscaler.adapters.registry.replica_grants import ReplicaGrants
from services.autoscaler.adapters.replica_logs import ReplicaLogs
from services.autoscaler.adapters.warm_offers import WarmOffers
from services.autoscaler.application import warm_claims
from services.autoscaler.application import warm_pool as warm
from services.autoscaler.application.warm_claims import NOBODY
from services.autoscaler.application.warm_pool import WarmPool
from services.autoscaler.domain.log_retention import MOST_EACH
from services.autoscaler.domain.warm_pool import WarmClaim
from services.worker.application.warm_standby import WarmStandby
from services.worker.settings import WorkerSettings
from tests.conftest import PATIENCE_S, Line
from tests.integration.autoscaler.process_harness import ProcessHarness
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import warm_queue
from tidegate.kernel.protocol.models import Assignment
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.warm_pool import WarmAssignment, WarmPoolSpec
from tidegate.kernel.store import Store, StoreUnavailable

REPLICA = "digits-v1-0-1"


@dataclass
class WarmPoolHarness:
    """A warm pool over real processes, with heartbeats that the test writes to the store."""

    processes: ProcessHarness
    store: Store
    amqp_url: str
    pool_name: str

    @asynccontextmanager
    async def pool(self, workers: int = 1) -> AsyncIterator[WarmPool]:
        """Return a new pool, as after a restart of the autoscaler."""
        decision_store = DecisionStore(self.processes.state / "autoscaler.db")
        pools = {self.pool_name: WarmPoolSpec(workers=workers)}
        async with WarmOffers(self.amqp_url, pools) as offers:
            await offers._connection.wait_up(PATIENCE_S)
            launcher = self.processes.launcher()
            registry = RegistryClient("http://127.0.0.1:1", "t")
            pool = WarmPool(
                launcher,
                self.store,
                decision_store,
                offers,
                ReplicaGrants(registry),
                pools,
                self.processes.state / "log",
            )
            pool.take_over()
            yield pool
            await registry.close()
        decision_store.close()

    @asynccontextmanager
    async def filled(self, workers: int = 1) -> AsyncIterator[tuple[WarmPool, list[str]]]:
        """Return a pool whose workers send heartbeats, and their names."""
        async with self.pool(workers) as pool:
            await pool.check()
            names = self.names()
            for name in names:
                await self.report(name)
            await pool.check()
            yield pool, names

    def names(self) -> list[str]:
        return [path.name for path in self.processes.folders() if path.name.startswith("warm-")]

    async def report(self, name: str, state: str = "warm") -> None:
        await self.store.report_replica(ReplicaReport(name, f"warm-{self.pool_name}-", 1, "h", 1, state))  # type: ignore[arg-type]

    @asynccontextmanager
    async def taking(self, by: str) -> AsyncIterator[list[str]]:
        """Run a worker that takes every offer, and return the replicas."""
        taken: list[str] = []

        async def take(delivery: Delivery) -> None:
            offered = Assignment.model_validate_json(bytes(delivery.body))
            if await self.store.claim_replica(offered.replica, by) == by:
                taken.append(offered.replica)

        async def listen(channel: Channel) -> None:
            await channel.declare(warm_queue(self.pool_name))
            await channel.consume(warm_queue(self.pool_name), take, prefetch=1, no_ack=True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(warm, "OFFER_S", PATIENCE_S)  # a busy machine may need longer than an offer lives
            async with Connection(self.amqp_url, "worker", listen) as connection:
                await connection.wait_up(PATIENCE_S)
                yield taken


@pytest.fixture
async def harness(
    processes: ProcessHarness, valkey_url: str, rabbitmq_url: str, request: pytest.FixtureRequest
) -> AsyncIterator[WarmPoolHarness]:
    store = Store.connect(valkey_url.removesuffix("/0") + "/6")
    pool = f"f{abs(hash(request.node.name)) % 10**8}"
    yield WarmPoolHarness(processes, store, rabbitmq_url, pool)
    for report in await store.replicas():
        await store.forget_replica(report.replica)
    await store._redis.delete(f"tidegate:claim:{REPLICA}")
    await store.close()


async def test_a_worker_that_waits_becomes_the_replica_and_another_takes_its_place(
    harness: WarmPoolHarness, assign: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "REFILL_AFTER_S", 0.0)
    async with harness.filled() as (pool, [worker]):
        assert [each["ready"] for each in pool.view()] == [[worker]]
        async with harness.taking(worker) as taken:
            await pool.launch(assign(REPLICA, drain_limit_s=7.0))
        assert taken == [REPLICA]
        (found,) = await pool.list()
        assert (found.replica, found.worker, found.alive) == (REPLICA, worker, True)
        assert (found.deployment, found.slot, found.generation) == ("digits-v1", 0, 1)
        assert found.drain_limit_s == 7.0
        log = harness.processes.state / "log" / f"worker-{REPLICA}.log"
        assert log.resolve().name == f"worker-{worker}.log"
        await pool.check()
        (other,) = set(harness.names()) - {worker}

        # After a restart, the autoscaler knows both names.
        async with harness.pool() as again:
            assert [each.replica for each in await again.list()] == [REPLICA]
            await again.drain(REPLICA)
            assert (await again.list())[0].draining_since is not None
            await again.kill(REPLICA)
            assert await again.list() == []
            assert harness.names() == [other]


async def test_without_one_that_waits_it_is_started_at_once(
    harness: WarmPoolHarness, assign: Callable[..., Any]
) -> None:
    async with harness.pool() as pool:
        await pool.launch(assign(REPLICA))
        assert [(each.replica, each.worker) for each in await pool.list()] == [(REPLICA, "")]


async def test_an_offer_that_nobody_takes_is_withdrawn_and_the_replica_started(
    harness: WarmPoolHarness, assign: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "OFFER_S", 0.2)
    async with harness.filled() as (pool, [worker]):
        await pool.launch(assign(REPLICA))
        assert [(each.replica, each.worker) for each in await pool.list()] == [(REPLICA, "")]
        # A late worker learns that it cannot have the replica any more.
        assert await harness.store.claim_replica(REPLICA, worker) == NOBODY
        assert [each["there"] for each in pool.view()] == [1]


async def test_with_the_broker_away_it_is_started_at_once(
    harness: WarmPoolHarness, assign: Callable[..., Any]
) -> None:
    async with harness.filled() as (pool, _):
        await pool._offers._connection.stop()
        await pool.launch(assign(REPLICA))
        assert [(each.replica, each.worker) for each in await pool.list()] == [(REPLICA, "")]


async def test_with_a_broker_that_does_not_answer_it_is_started_after_a_moment(
    harness: WarmPoolHarness, line: Line, assign: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "OFFER_S", 0.2)
    harness.amqp_url = line.url
    async with harness.filled() as (pool, _):
        line.flows.clear()
        async with asyncio.timeout(PATIENCE_S):
            await pool.launch(assign(REPLICA))
        assert [(each.replica, each.worker) for each in await pool.list()] == [(REPLICA, "")]
        line.flows.set()


async def test_with_the_store_away_it_is_started_at_once(
    harness: WarmPoolHarness, assign: Callable[..., Any]
) -> None:
    """Without the store, no worker can claim the replica."""
    async with harness.filled() as (pool, [worker]), harness.taking(worker) as taken:
        pool._store = Store.connect("redis://127.0.0.1:1/0")
        await pool.launch(assign(REPLICA))
        assert [(each.replica, each.worker) for each in await pool.list()] == [(REPLICA, "")]
        assert taken == []
        await pool._store.close()


async def test_with_the_store_lost_after_the_offer_the_next_start_does_not_try_it(
    harness: WarmPoolHarness, assign: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.filled() as (pool, _):
        away = Store.connect("redis://127.0.0.1:1/0")
        monkeypatch.setattr(pool, "_claimant", away.claimant)
        with pytest.raises(StoreUnavailable):
            await pool.launch(assign(REPLICA))
        await pool.launch(assign("digits-v1-0-2"))
        assert harness.processes.folders()[0].name == "digits-v1-0-2"
        await away.close()


async def test_the_pool_outlives_a_look_that_fails(
    harness: WarmPoolHarness, until: Callable[..., Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "PERIOD_S", 0.01)
    async with harness.pool() as pool:
        launch = pool._launcher.launch

        async def full(_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(pool._launcher, "launch", full)
        holding = asyncio.create_task(pool.hold(lambda: True))
        await until(lambda: pool.problem)
        assert "No space left" in str(pool.problem)
        monkeypatch.setattr(pool._launcher, "launch", launch)
        await until(harness.names)
        await until(lambda: pool.problem is None)
        holding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await holding


async def test_logs_under_two_names_are_kept_and_deleted_like_others(tmp_path: Path) -> None:
    logs = ReplicaLogs(tmp_path, clock=lambda: 1000.0)
    for number in range(MOST_EACH + 2):
        logs.path(f"warm-cpu--0-{number}").write_text("output")
        logs.path(f"digits-v1-0-{number}").symlink_to(logs.path(f"warm-cpu--0-{number}").name)
        os.utime(logs.path(f"warm-cpu--0-{number}"), (number, number))
        os.utime(logs.path(f"digits-v1-0-{number}"), (number, number), follow_symlinks=False)
    logs.path("soon").symlink_to("worker-not-there-yet.log")
    logs.prune(lambda each: each == "warm-cpu--0-0")
    left = {path.stem[7:] for path in tmp_path.iterdir()}
    assert {"warm-cpu--0-0", "digits-v1-0-0", "soon"} <= left, "logs of a live replica, and the newest"
    assert len(left) == 2 * MOST_EACH + 3
    assert "digits-v1-0-1" not in left, "the oldest ended ones"
    logs.prune()
    assert len(list(tmp_path.iterdir())) == 2 * MOST_EACH + 1
    logs.prune()


@pytest.mark.parametrize("ours", [True, False])
async def test_a_worker_asks_until_it_knows_whose_an_offer_is(
    valkey_url: str, assign: Callable[..., Any], tmp_path: Path, ours: bool
) -> None:
    """The lost answer may have confirmed the claim. Then no other worker would take the replica."""
    url = valkey_url.removesuffix("/0") + "/6"
    line, there = Line(url), Store.connect(url)
    await line.up()
    await there._redis.delete(f"tidegate:claim:{REPLICA}")
    away = Store.connect(line.url)
    await away.claimant(REPLICA)
    given = WarmAssignment(
        replica="warm-cpu--0-1", generation=1, pool_name="cpu", pool=WarmPoolSpec(), launched_at=0
    )
    worker = WarmStandby(WorkerSettings(), given, tmp_path, away, 0)
    await line.down()
    taking = asyncio.create_task(worker._claim(assign(REPLICA)))
    await asyncio.sleep(0.3)
    assert not taking.done()
    await there.claim_replica(REPLICA, given.replica if ours else NOBODY)
    await line.up()
    assert await taking
    assert worker._assigned.done() is ours
    # A worker that has a replica, or that ends, takes no other.
    assert await worker._claim(assign("digits-v1-1-1")) is not ours
    await worker._close()
    assert not await worker._claim(assign("digits-v1-1-1"))
    for replica in (REPLICA, "digits-v1-1-1"):
        await there._redis.delete(f"tidegate:claim:{replica}")
    await line.close()
    await away.close()
    await there.close()


async def test_an_offer_cannot_say_where_the_registry_is(
    harness: WarmPoolHarness, assign: Callable[..., Any], tmp_path: Path, until: Callable[..., Awaitable[Any]]
) -> None:
    """Otherwise a worker would send its credential to that address, and run a model from there."""
    given = WarmAssignment(
        replica="warm-cpu--0-1", generation=1, pool_name=harness.pool_name, pool=WarmPoolSpec(), launched_at=0
    )
    worker = WarmStandby(WorkerSettings(), given, tmp_path, harness.store, 0)
    forged = assign(REPLICA).model_dump(mode="json") | {"registry_url": "http://127.0.0.1:9"}
    queue = warm_queue(harness.pool_name)
    async with Connection(harness.amqp_url, "worker", worker._on_setup) as connection:
        channel = await connection.wait_up(PATIENCE_S)
        await channel.publish(orjson.dumps(forged), routing_key=queue.name, mandatory=True)
        await channel.publish(b"{}", routing_key=queue.name, mandatory=True)

        async def read() -> bool:
            return await channel.depth(queue) == 0

        await until(read)
    async with Connection(harness.amqp_url, "after", _nothing) as connection:
        assert await (await connection.wait_up(PATIENCE_S)).depth(queue) == 0, (
            "an offer that is not settled comes again"
        )
    assert not worker._assigned.done()
    assert await harness.store.claimant(REPLICA) is None


async def _nothing(_: Channel) -> None:
    return


@pytest.mark.parametrize("taken", [True, False])
async def test_an_offer_of_a_leader_that_was_killed_is_settled_by_the_store(
    harness: WarmPoolHarness, assign: Callable[..., Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leader stored the offer, and died before it read the answer."""
    monkeypatch.setattr(warm_claims, "SETTLE_S", 600.0)
    async with harness.filled() as (pool, [worker]):
        start = assign(REPLICA)
        pool._decision_store.save_claim(WarmClaim(REPLICA, "f", start.launched_at, 7.0))
        async with harness.pool(workers=0) as again:
            # It is not ended as long as it may be the replica, although the pool is empty now.
            await again.check()
            assert harness.names() == [worker]
            if taken:
                await harness.store.claim_replica(REPLICA, worker)
            monkeypatch.setattr(warm_claims, "SETTLE_S", 0.0)
            await again.check()
            found = [(each.replica, each.worker) for each in await again.list()]
            assert found == ([(REPLICA, worker)] if taken else [])
            assert harness.names() == ([worker] if taken else [])


async def test_two_at_once_are_not_given_the_same_worker(
    harness: WarmPoolHarness, assign: Callable[..., Any], until: Callable[..., Awaitable[Any]]
) -> None:
    async with harness.filled() as (pool, [worker]), harness.taking(worker) as taken:
        second = "digits-v1-1-1"
        await asyncio.gather(pool.launch(assign(REPLICA)), pool.launch(assign(second)))
        found = {each.replica: each.worker for each in await pool.list()}
        await until(lambda: taken, "the pool may know it before the worker's task")
        assert len(taken) == 1
        assert found == {REPLICA: "", second: ""} | {taken[0]: worker}
        await harness.store._redis.delete(f"tidegate:claim:{second}")


async def test_one_that_died_while_it_waited_is_replaced(
    harness: WarmPoolHarness, until: Callable[..., Awaitable[Any]]
) -> None:
    async with harness.filled() as (pool, [worker]):
        harness.processes.until_up(worker)
        harness.processes.crash(worker)
        await pool.check()
        assert harness.names() == []
        assert "ended" in pool.view()[0]["problem"] or "gone" in pool.view()[0]["problem"]

        async def another() -> bool:
            await pool.check()
            return bool(harness.names())

        assert not await another(), "the first one after a failure waits a second"
        await until(another)
        assert harness.names() != [worker]


async def test_the_pool_is_filled_and_emptied_as_it_is_wanted(harness: WarmPoolHarness) -> None:
    async with harness.filled(workers=3) as (pool, names):
        assert len(names) == 3
        holding = asyncio.create_task(pool.hold(lambda: False))
        await asyncio.sleep(0)
        holding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await holding
    async with harness.pool(workers=1) as pool:
        await pool.check()
        assert len(harness.names()) == 1
        await pool.check(may_start=False)
        assert len(harness.names()) == 1

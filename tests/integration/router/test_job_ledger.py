"""The ledger of jobs, on real sources: balanced, unknown, and with a job lost on purpose."""

from __future__ import annotations

import math
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from prometheus_client import REGISTRY

from services.router.application import ledger as ledger_module
from services.router.application.ledger import Ledger
from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import jobs_queue
from tidegate.kernel.protocol.presence import GatewayReport, ReplicaReport
from tidegate.kernel.store import JobStore, Store
from tidegate.stack.standalone import valkey_running

pytestmark = pytest.mark.integration


@pytest.fixture
async def start(rabbitmq_url, valkey_url, store, jobs, monkeypatch) -> AsyncIterator[Callable[..., Any]]:
    """Start a ledger with short pauses, and stop it after the test."""
    monkeypatch.setattr(ledger_module, "REPORTS_S", 0.02)
    async with AsyncExitStack() as stack:

        async def started(
            url: str = rabbitmq_url,
            records: JobStore = jobs,
            live: Store = store,
            leads: Callable[[], bool] = lambda: True,
        ) -> Ledger:
            found = Ledger(records, live, url, 0.02, leads=leads)
            found.start()
            stack.push_async_callback(found.stop)
            return found

        yield started


@pytest.fixture
async def broker(rabbitmq_url, making) -> AsyncIterator[Channel]:
    """A channel, and the queue of the test's Deployment."""

    async def setup(channel: Channel) -> None:
        await channel.declare(jobs_queue(making.deployment, "normal"))

    async with Connection(rabbitmq_url, "test", setup) as connection:
        yield await connection.wait_up(PATIENCE_S)


def gauge() -> float:
    found = REGISTRY.get_sample_value("tidegate_jobs_unaccounted")
    assert found is not None
    return found


async def known(ledger: Ledger, until) -> None:
    await until(lambda: ledger.report.unaccounted is not None)


async def queued(making, broker) -> bytes:
    """Create a job whose message is in the broker."""
    id_ = await making.accepted()
    queue = jobs_queue(making.deployment, "normal")
    await broker.publish(id_, routing_key=queue.name, persistent=True, mandatory=True)
    await making.store.queued([id_])
    return id_


async def test_before_the_first_reading_the_ledger_is_unknown(store, jobs, rabbitmq_url):
    assert Ledger(jobs, store, rabbitmq_url, 1.0, leads=lambda: True).report.unaccounted is None
    assert math.isnan(gauge())


async def test_it_balances(start, making, broker, store, until):
    for _ in range(3):
        await queued(making, broker)
    await making.ended()
    await making.ended(state="failed")
    await making.accepted()  # not confirmed: watched
    await making.store.acknowledged("gateway-1", 5)
    ledger = await start()
    await known(ledger, until)
    to_json = ledger.report.to_json()
    assert to_json["unaccounted"] == 0
    assert to_json["missing"] == {"records": 0, "endings": 0, "messages": 0}
    assert (to_json["acknowledged"], to_json["accepted"]) == (5, 6)
    assert to_json["over"] == {"succeeded": 1, "failed": 1, "cancelled": 0, "expired": 0}
    assert to_json["unfinished"] == {"accepting": 1, "queued": 3, "running": 0}
    assert to_json["messages"]["ready"] == 3
    assert gauge() == 0.0


async def test_a_message_at_a_worker_is_no_loss(start, making, store, until):
    await making.running()
    report = ReplicaReport("r-0-1", making.deployment, 1, "h", 1, "ready", jobs=1)
    await store.report_replica(report)
    ledger = await start()
    await known(ledger, until)
    await until(lambda: len(ledger._missing) == 3)
    assert ledger.report.unaccounted == 0


async def test_a_lost_message_shows(start, making, broker, until):
    await queued(making, broker)
    await queued(making, broker)
    ledger = await start()
    await known(ledger, until)
    await broker.delete(jobs_queue(making.deployment, "normal"))
    await until(lambda: ledger.report.unaccounted == 2)
    assert gauge() == 2.0
    await making.store.cancel((await making.store.list(limit=1))[0].id)
    await until(lambda: ledger.report.unaccounted == 1)


async def test_a_lost_record_shows(start, making, until):
    """There are more 202s than records: the store has lost jobs that it had confirmed."""
    await making.ended()
    await making.store.acknowledged("gateway-1", 2)
    ledger = await start()
    await until(lambda: ledger.report.unaccounted == 1)
    assert ledger.report.missing.records == 1


async def test_with_the_broker_away_it_is_unknown(start, line, making, until):
    ledger = await start(line.url)
    await known(ledger, until)
    await line.down()
    await until(lambda: ledger.report.unaccounted is None)
    assert "broker" in ledger.report.away
    assert math.isnan(gauge())
    await line.up()
    await known(ledger, until)
    assert gauge() == 0.0


async def test_with_a_gateway_missing_it_is_unknown(start, store, until):
    ledger = await start()
    await known(ledger, until)
    await store.report_gateway(GatewayReport("gone", time.time(), {}))
    await store._redis.delete("tidegate:gateway:gone")
    await until(lambda: ledger.report.unaccounted is None)
    assert "gone" in ledger.report.away["gateways"]
    await store.forget_gateway("gone")
    await known(ledger, until)


@pytest.mark.parametrize("which", ["records", "workers"])
async def test_with_a_store_away_it_is_unknown(start, store, jobs, tmp_path, until, which):
    with valkey_running(tmp_path) as url:
        away_jobs, away_live = JobStore.connect(url), Store.connect(url)
        given = {"records": away_jobs} if which == "records" else {"live": away_live}
        ledger = await start(**given)
        await known(ledger, until)
    await until(lambda: ledger.report.unaccounted is None)
    assert which in ledger.report.away
    await ledger.stop()
    await away_jobs.close()
    await away_live.close()


async def test_never_a_false_loss_while_jobs_move(start, making, broker, store, until):
    """Jobs arrive, start and end all the time. Jobs that only move are not missing."""
    ledger = await start()
    await known(ledger, until)
    reported: set[int | None] = set()
    for _ in range(150):
        await queued(making, broker)
        taken = await making.store.list(deployment=making.deployment, state="queued", limit=1)
        if taken and os.urandom(1)[0] % 2:
            await making.store.cancel(taken[0].id)
        reported.add(ledger.report.unaccounted)
    assert reported == {0}


async def test_a_router_that_does_not_lead_says_so(start, making, broker, until):
    """Only one router may count the jobs, or a sum over routers would be twice the number."""
    led = [True]
    await queued(making, broker)
    ledger = await start(leads=lambda: led[0])
    await until(lambda: ledger.report.unaccounted == 0)
    assert REGISTRY.get_sample_value("tidegate_jobs", {"state": "queued"}) == 1
    led.clear()
    led.append(False)
    await until(lambda: "leader" in ledger.report.away)
    assert ledger.report.unaccounted is None
    assert math.isnan(gauge())
    assert REGISTRY.get_sample_value("tidegate_jobs", {"state": "queued"}) is None

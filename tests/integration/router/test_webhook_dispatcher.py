"""Webhooks with a real store, real receivers and several routers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import orjson
import pytest
from standardwebhooks import Webhook

from services.router.adapters.webhook_sender import WebhookSender
from services.router.application.webhook_dispatcher import WebhookDispatcher
from services.router.domain.webhooks import RetryPolicy, WebhookLimits, secret_of
from tests.integration.router.conftest import Receiver
from tidegate.kernel.store.jobs import JobStore
from tidegate.kernel.store.webhooks import Settled, WebhookStore

pytestmark = pytest.mark.integration

MASTER = b"m" * 32
QUICK = RetryPolicy(first_s=0.02, longest_s=0.1, give_up_s=600.0)


@pytest.fixture
async def schedule(valkey_url, jobs) -> AsyncIterator[WebhookStore]:
    found = WebhookStore.connect(valkey_url)
    yield found
    await found.close()


@pytest.fixture
async def start(valkey_url, schedule) -> AsyncIterator[Callable[..., Any]]:
    """Start a webhook dispatcher, and stop it after the test."""
    async with AsyncExitStack() as stack:

        async def started(
            *,
            retry_policy: RetryPolicy = QUICK,
            limits: WebhookLimits = WebhookLimits(),
            allow_private: bool = True,
            leads: Callable[[], bool] = lambda: True,
        ) -> WebhookDispatcher:
            store, jobs = WebhookStore.connect(valkey_url), JobStore.connect(valkey_url)
            stack.push_async_callback(store.close)
            stack.push_async_callback(jobs.close)
            sender = WebhookSender(
                allow_private=allow_private, timeout_s=limits.timeout_s, max_in_flight=limits.max_in_flight
            )
            found = WebhookDispatcher(
                store, jobs, sender, MASTER, limits=limits, retry_policy=retry_policy, leads=leads
            )
            found.start()
            stack.push_async_callback(found.stop)
            return found

        yield started


async def waiting(schedule: WebhookStore) -> int:
    """Return the number of webhooks on the schedule."""
    _, found = await schedule.claim(0, 0)
    return found


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "expired"])
async def test_every_ending_sends_a_webhook_that_the_reference_verifier_accepts(
    start, making, receiver, schedule, until, state
):
    id_ = await making.ended(receiver.url, state)
    await start()
    await until(lambda: receiver.got)
    ((headers, body),) = receiver.got
    event = Webhook(secret_of(MASTER, "team")).verify(body, headers)
    assert event["type"] == f"job.{state}"
    assert (event["data"]["id"], event["data"]["status"]) == (id_.hex(), state)
    assert headers["webhook-id"] == f"msg_{id_.hex()}"
    assert headers["content-type"] == "application/json"

    async def over() -> bool:
        return await waiting(schedule) == 0

    await until(over)
    (tried,) = await schedule.deliveries(id_)
    assert (tried["attempt"], tried["status"], tried["outcome"]) == (1, 204, "delivered")
    counts = await making.store.counts()
    assert counts.ledger["webhooks_delivered"] == 1


async def test_jobs_without_a_webhook_send_none(making, schedule):
    await making.ended(None)
    await making.running("http://127.0.0.1:1/")
    assert await waiting(schedule) == 0


async def test_retries_have_the_same_id(start, making, receiver, schedule, until):
    receiver.status = 500
    id_ = await making.ended(receiver.url)
    await start()
    await until(lambda: len(receiver.got) >= 3)
    receiver.status = 200

    async def delivered() -> bool:
        tries = await schedule.deliveries(id_)
        return bool(tries) and tries[-1]["outcome"] == "delivered"

    await until(delivered)
    assert set(receiver.ids) == {f"msg_{id_.hex()}"}
    tries = await schedule.deliveries(id_)
    assert [each["attempt"] for each in tries] == list(range(1, len(tries) + 1))
    assert tries[0]["status"] == 500
    assert tries[0]["again_in_s"] is not None


async def test_a_webhook_is_given_up_at_last(start, making, receiver, schedule, until):
    receiver.status = 500
    id_ = await making.ended(receiver.url)
    await start(retry_policy=RetryPolicy(first_s=0.01, longest_s=0.05, give_up_s=0.5))

    async def given_up() -> bool:
        return (await making.store.counts()).ledger.get("webhooks_given_up") == 1

    await until(given_up)
    assert await waiting(schedule) == 0
    assert (await schedule.deliveries(id_))[-1]["outcome"] == "given_up"


async def test_redirects_are_not_followed(start, making, receiver, schedule, until):
    other = Receiver()
    await other.up()
    receiver.status, receiver.extra = 302, f"Location: {other.url}\r\n"
    id_ = await making.ended(receiver.url)
    await start()
    await until(lambda: len(receiver.got) >= 2)
    await other.down()
    assert other.got == []
    assert (await schedule.deliveries(id_))[0]["status"] == 302


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0.0.0.0", "[::ffff:127.0.0.1]"])
async def test_private_addresses_are_refused_when_it_connects(start, making, receiver, schedule, until, host):
    """The name does not matter, only the address that it resolves to."""
    id_ = await making.ended(receiver.url.replace("127.0.0.1", host))
    await start(allow_private=False)

    async def tried() -> Any:
        return await schedule.deliveries(id_)

    first = (await until(tried))[0]
    assert first["status"] is None
    assert first["problem"] == "the address is not allowed: webhooks go to public addresses only"
    assert receiver.got == []


async def test_an_unknown_host_name(start, making, schedule, until):
    id_ = await making.ended("http://nobody.invalid/hook")
    await start()

    async def tried() -> Any:
        return await schedule.deliveries(id_)

    assert "cannot be resolved" in (await until(tried))[0]["problem"]


async def test_several_routers_send_each_webhook_once(start, making, receiver, schedule, until):
    ids = await asyncio.gather(*(making.ended(receiver.url) for _ in range(200)))
    receiver.delay_s = 0.005
    for _ in range(3):
        await start()

    async def over() -> bool:
        return await waiting(schedule) == 0

    await until(over)
    assert Counter(receiver.ids) == {f"msg_{id_.hex()}": 1 for id_ in ids}


async def test_one_receiver_gets_a_limited_number_at_once(start, making, receiver, until):
    receiver.delay_s = 0.01
    await asyncio.gather(*(making.ended(receiver.url) for _ in range(30)))
    await start(limits=WebhookLimits(per_host=3))
    await until(lambda: len(receiver.got) == 30)
    assert receiver.most_open <= 3


async def test_a_dead_receiver_delays_no_other(start, making, receiver, schedule, until):
    """Hundreds of webhooks for a dead receiver are due before those for another one."""
    deaf = Receiver()
    await deaf.up()
    deaf.status = None
    await asyncio.gather(*(making.ended(deaf.url) for _ in range(400)))
    await asyncio.gather(*(making.ended(receiver.url) for _ in range(100)))
    # Done one after the other, the 400 would take longer than the test waits.
    limits = WebhookLimits(max_in_flight=8, per_host=4, timeout_s=600.0)
    await start(limits=limits, retry_policy=RetryPolicy(first_s=5.0))
    await until(lambda: len(receiver.got) == 100)
    await deaf.down()
    assert len(deaf.got) <= 4


async def test_a_receiver_that_recovers_gets_all_webhooks(start, making, receiver, schedule, until):
    await receiver.down()
    ids = await asyncio.gather(*(making.ended(receiver.url) for _ in range(20)))
    await start()

    async def tried() -> bool:
        return (await making.store.counts()).ledger.get("webhooks_delivered", 0) == 0 and any(
            [await schedule.deliveries(id_) for id_ in ids]
        )

    await until(tried)
    await receiver.up()
    await until(lambda: set(receiver.ids) == {f"msg_{id_.hex()}" for id_ in ids})


async def test_the_claims_of_a_lost_router_are_sent_by_another(start, making, receiver, schedule, until):
    id_ = await making.ended(receiver.url)
    (held,), _ = await schedule.claim(10, 300)
    assert held.id == id_
    await start()
    await until(lambda: receiver.got)
    assert await schedule.settle([]) == []

    async def over() -> bool:
        return await waiting(schedule) == 0

    await until(over)


async def test_a_late_settlement_changes_nothing(making, schedule, until):
    id_ = await making.ended("http://127.0.0.1:1/")
    (first,), _ = await schedule.claim(10, 1)

    async def again() -> Any:
        due, _ = await schedule.claim(10, 60_000)
        return due

    (second,) = await until(again)
    assert await schedule.settle([Settled(id_, first.claim, counted="delivered")]) == [False]
    assert await waiting(schedule) == 1
    assert await schedule.settle([Settled(id_, second.claim, counted="delivered")]) == [True]
    assert await waiting(schedule) == 0


async def test_a_removed_job_has_no_webhook(start, making, receiver, schedule, until):
    await making.ended(receiver.url)
    now_ms = int(time.time() * 1e3)
    assert await making.store.retire(now_ms + 10, 0, 10, 10) == 1
    assert await waiting(schedule) == 0


async def test_the_body_is_the_job_as_the_api_returns_it(start, making, receiver, until):
    id_ = await making.ended(receiver.url, metadata={"order": 7})
    await start()
    await until(lambda: receiver.got)
    job = await making.store.get(id_)
    assert job is not None
    assert orjson.loads(receiver.got[0][1])["data"] == orjson.loads(orjson.dumps(job.public()))


async def test_a_router_that_does_not_lead_claims_nothing(start, making, receiver, schedule, until):
    await making.ended(receiver.url)
    asked: list[None] = []
    led: list[bool] = []

    def leads() -> bool:
        asked.append(None)
        return bool(led)

    await start(leads=leads)
    await until(lambda: len(asked) > 2)
    assert receiver.got == []
    assert await waiting(schedule) == 1
    led.append(True)
    await until(lambda: len(receiver.got) == 1)

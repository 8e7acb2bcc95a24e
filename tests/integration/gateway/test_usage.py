"""Usage reports over the real broker: none is lost during an outage, and none counts twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from services.gateway.adapters.store.job_usage import JobUsageStore
from services.gateway.adapters.usage_reporter import UsageReporter
from tests.conftest import PATIENCE_S
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import USAGE
from tidegate.kernel.protocol.usage import UsageReport

pytestmark = pytest.mark.integration


class Registry:
    """A consumer of reports that adds up those it has not seen."""

    def __init__(self, url: str) -> None:
        self.requests: Counter[str] = Counter()
        self.seen: set[tuple[str, int]] = set()
        self.connection = Connection(url, "test usage", self._setup)

    async def _setup(self, channel: Channel) -> None:
        async def on_delivery(delivery: Delivery) -> None:
            report = UsageReport.from_json(bytes(delivery.body))
            if (report.incarnation, report.seq) not in self.seen:
                self.seen.add((report.incarnation, report.seq))
                for subject, counts in report.counts.items():
                    self.requests[subject.principal] += counts[0]
            channel.ack(delivery.tag)

        await channel.declare(USAGE)
        await channel.consume(USAGE, on_delivery, prefetch=10)


@pytest.fixture
async def registry(rabbitmq_url) -> AsyncIterator[Registry]:
    found = Registry(rabbitmq_url)
    async with found.connection:
        await found.connection.wait_up(PATIENCE_S)
        yield found


@pytest.fixture
async def job_usage(jobs_url) -> AsyncIterator[JobUsageStore]:
    found = JobUsageStore.connect(jobs_url)
    yield found
    await found.close()


async def test_usage_counted_while_the_broker_is_away_is_reported_once(
    line, registry, job_usage, fresh, until
):
    key = fresh("key")
    usage = UsageReporter(line.url, fresh("g"), 0.02, job_usage)
    usage.start()
    await usage.connection.wait_up(PATIENCE_S)
    for _ in range(5):
        usage.counts(key, "digits")[0] += 10
        await line.down()
        usage.counts(key, "digits")[0] += 1
        await asyncio.sleep(0.05)
        await line.up()
        await usage.connection.wait_up(PATIENCE_S)
    await until(lambda: registry.requests[key] == 55)
    usage.counts(key, "digits")[0] += 1
    await usage.stop()
    await until(lambda: registry.requests[key] == 56)


async def test_the_usage_of_jobs_is_reported_and_deleted(
    rabbitmq_url, jobs_url, registry, job_usage, fresh, until
):
    key = fresh("key")
    redis = Redis.from_url(jobs_url)
    await redis.hset("tidegate:job:used", f"20000\n{key}\ndigits\nrequests", 7)
    usage = UsageReporter(rabbitmq_url, fresh("g"), 0.02, job_usage)
    usage.start()
    await until(lambda: registry.requests[key] == 7)

    async def forgotten() -> bool:
        return not await redis.keys("tidegate:job:used*")

    await until(forgotten)
    await usage.stop()
    await redis.aclose()

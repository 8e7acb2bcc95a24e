"""A job that runs longer than the broker's ack timeout, on a broker that closes channels for that."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest

from tests.conftest import PATIENCE_S, with_exchanges
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import Queue
from tidegate.stack.standalone import rabbitmq_running

pytestmark = pytest.mark.integration

ACK_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def rabbitmq_url(tmp_path_factory) -> Iterator[str]:
    """Yield a broker with a short ack timeout that it checks all the time."""
    folder = tmp_path_factory.mktemp("impatient")
    (folder / "data").mkdir()
    (folder / "data" / "advanced.config").write_text("[{rabbit, [{channel_tick_interval, 1000}]}].\n")
    with rabbitmq_running(folder, ack_timeout_s=ACK_TIMEOUT_S) as url:
        asyncio.run(with_exchanges(url))
        yield url


async def test_a_long_job_is_leased(start, gateway, rabbitmq_url, until, nothing_is_left):
    """Another consumer holds a message unacked, to show when the broker closes such channels."""
    queue = Queue(f"impatient-{os.urandom(4).hex()}")
    downs: list[None] = []

    async def setup(channel):
        await channel.declare(queue)
        await channel.consume(queue, lambda delivery: None, prefetch=1)

    worker = await start(max_rows=0, ack_timeout_s=ACK_TIMEOUT_S)
    worker.model.open.clear()
    channel = worker.messages.connection.channel
    async with Connection(rabbitmq_url, "holder", setup, lambda: downs.append(None)) as holder:
        await (await holder.wait_up(PATIENCE_S)).publish(b"held", routing_key=queue.name)
        id_ = await gateway.submit()
        await until(lambda: downs, "the broker closes the channel of one that holds a message", 60)
    await until(lambda: len(worker.jobs.by_id) == 1 and worker.messages.unsettled == 0)
    await asyncio.sleep(ACK_TIMEOUT_S)
    assert worker.messages.connection.channel is channel
    worker.model.open.set()
    await until(lambda: gateway.is_in("succeeded", id_))
    job = await gateway.job(id_)
    assert (job.attempt, len(worker.model.calls)) == (1, 1)
    await nothing_is_left(worker)

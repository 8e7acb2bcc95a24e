"""The memory that the private RabbitMQ uses for its log."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tidegate.kernel.broker.connection import Channel, Connection
from tidegate.kernel.broker.topology import jobs_queue
from tidegate.stack.standalone import rabbitmq_running

pytestmark = pytest.mark.integration

MIB = 2**20


async def test_the_log_of_quorum_queues_is_written_out_early(tmp_path: Path) -> None:
    """RabbitMQ keeps a log file's entries in memory until the file is full; its default limit is 512 MB."""
    queue = jobs_queue("digits-v1", "normal")

    async def declare(channel: Channel) -> None:
        await channel.declare(queue)

    with rabbitmq_running(tmp_path) as url:
        async with Connection(url, "test", declare) as connection:
            await connection.wait_up(60)
            assert connection.channel is not None
            publish = connection.channel.publish
            for _ in range(10):
                await asyncio.gather(
                    *(publish(bytes(MIB), routing_key=queue.name, persistent=True) for _ in range(10))
                )
            logs = [path.stat().st_size for path in tmp_path.rglob("*.wal")]
    assert logs
    assert max(logs) < 64 * MIB

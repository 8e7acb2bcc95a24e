"""Change notifications over a real RabbitMQ."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.conftest import PATIENCE_S
from tests.integration.registry.onnx_files import onnx_bytes
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import EVENTS, REGISTRY_CHANGED, events_queue


@asynccontextmanager
async def listening(rabbitmq_url: str) -> AsyncIterator[asyncio.Queue[dict[str, Any]]]:
    """Receive the notifications of every registry of the broker in the block."""
    received: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def on_delivery(delivery: Delivery) -> None:
        received.put_nowait(json.loads(bytes(delivery.body)))

    async def listen(channel: Channel) -> None:
        queue = events_queue("test", "registry")
        await channel.declare(EVENTS)
        await channel.declare(queue)
        await channel.bind(queue, EVENTS, REGISTRY_CHANGED)
        await channel.consume(queue, on_delivery, prefetch=100, no_ack=True)

    async with Connection(rabbitmq_url, "test", listen) as connection:
        await connection.wait_up(PATIENCE_S)
        yield received


async def test_each_committed_change_is_published_once(opened, rabbitmq_url):
    async with listening(rabbitmq_url) as received, opened(amqp_url=rabbitmq_url) as call:
        await call.broker_connected()
        await call.register("digits", onnx_bytes())
        await call("POST", "/v1/deploy", {"model": "digits"})
        await call("PUT", "/v1/deployments/digits-v1", {"model": "digits", "version": 9}, status=409)
        await call("DELETE", "/v1/models/digits?cascade=true")
        async with asyncio.timeout(PATIENCE_S):
            events = [await received.get() for _ in range(6)]
        await asyncio.sleep(0)
        assert received.empty(), "a refused change is not published"
    assert [(e["revision"], e["kind"], e["name"], e["action"]) for e in events] == [
        (1, "version", "digits/1", "created"),
        (2, "deployment", "digits-v1", "created"),
        (2, "endpoint", "digits", "created"),
        (3, "endpoint", "digits", "deleted"),
        (3, "deployment", "digits-v1", "deleted"),
        (3, "version", "digits/1", "deleted"),
    ]


async def test_two_registries_of_a_database_publish_each_revision_once(opened, rabbitmq_url):
    each = 4
    async with (
        listening(rabbitmq_url) as received,
        opened(amqp_url=rabbitmq_url) as one,
        opened(amqp_url=rabbitmq_url) as other,
    ):
        for call in (one, other):
            await call.broker_connected()
        work = [call.register("digits", onnx_bytes(seed)) for seed in range(each) for call in (one, other)]
        numbers = {version["number"] for version in await asyncio.gather(*work)}
        async with asyncio.timeout(PATIENCE_S):
            events = [await received.get() for _ in numbers]
        await asyncio.sleep(0)
        assert received.empty()
        assert len(numbers) == each, "the same bytes are one version, at whichever registry they arrive"
    assert sorted(event["revision"] for event in events) == list(range(1, each + 1))

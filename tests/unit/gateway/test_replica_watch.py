"""The watch of replicas, with channels in memory: a broker that was away proves nothing about a replica."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.gateway.adapters import replica_watch as module
from services.gateway.adapters.replica_watch import LOOKS, ReplicaWatch
from tidegate.kernel.broker.topology import Queue, sequences_queue

pytestmark = pytest.mark.unit

QUEUE = sequences_queue("sums-v1", "sums-v1-0-1")


class Channel:
    """A channel on which no worker reads a queue."""

    async def declare(self, _: Queue) -> None:
        """Have all queues."""

    async def consumers(self, _: Queue) -> int:
        return 0


async def looks(watch: ReplicaWatch) -> None:
    silent: dict[str, int] = {}
    for _ in range(LOOKS):
        silent = await watch._look(silent)


async def test_a_worker_has_time_to_come_back_after_a_loss_of_the_broker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    connection = SimpleNamespace(channel=Channel(), problem=None)
    lost: list[bytes] = []
    watch = ReplicaWatch(lambda: cast(Any, connection), lost.append)
    await watch.declare(QUEUE)
    connection.channel = Channel()
    watch._waiting, watch._queues = {QUEUE.name: {b"1": 0.0}}, {QUEUE.name: QUEUE}
    await looks(watch)
    assert lost == [], "the worker may reconnect later than the gateway"
    monkeypatch.setattr(module, "BACK_S", 0.0)
    await looks(watch)
    assert lost == [b"1"]


async def test_a_killed_replica_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    connection = SimpleNamespace(channel=Channel(), problem=None)
    lost: list[bytes] = []
    watch = ReplicaWatch(lambda: cast(Any, connection), lost.append)
    await watch.declare(QUEUE)
    watch.begin(QUEUE, b"1")
    while not lost:
        await asyncio.sleep(0.005)
    await watch.stop()
    assert lost[0] == b"1"

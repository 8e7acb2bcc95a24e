"""A gateway that has just started: it accepts requests before it is connected to the broker."""

from __future__ import annotations

import asyncio
import os

import pytest

from services.gateway.adapters.dispatcher import Dispatcher
from services.gateway.domain.memory_budget import MemoryBudget
from tests.conftest import PATIENCE_S
from tests.integration.gateway.test_dispatcher import submit, told
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration


async def test_requests_wait_until_replies_have_a_queue(
    rabbitmq_url, fleets, claims, peer, route, until, monkeypatch
):
    """A gateway that has just started accepts requests. Replies to them would be lost without a queue."""
    gate, setup = asyncio.Event(), Dispatcher._on_back_setup

    async def late(self, channel) -> None:
        await gate.wait()
        await setup(self, channel)

    monkeypatch.setattr(Dispatcher, "_on_back_setup", late)
    dispatcher = Dispatcher(rabbitmq_url, os.urandom(8), fleets, claims=claims, answers=MemoryBudget(2**30))
    dispatcher.start()
    try:
        _, future = submit(dispatcher, route(), 7)
        await asyncio.sleep(0.5)
        assert not peer.requests
        gate.set()
        async with asyncio.timeout(PATIENCE_S):
            assert told(await future) == 7
    finally:
        await dispatcher.stop()


async def test_the_problem_is_the_error_of_the_broker(fleets, claims, until):
    """Also of the connection for replies, which is first."""
    (nobody,) = free_ports(1)
    url = f"amqp://127.0.0.1:{nobody}/"
    dispatcher = Dispatcher(url, os.urandom(8), fleets, claims=claims, answers=MemoryBudget(2**30))
    dispatcher.start()
    try:
        problem = await until(lambda: (found := dispatcher.problem()) and "yet" not in found and found)
        assert str(nobody) in problem
    finally:
        await dispatcher.stop()

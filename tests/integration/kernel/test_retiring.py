"""A server that retires waits for the calls on its other ports, and a stop ends that wait in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI

from tidegate.kernel.service import app as service
from tidegate.kernel.settings.base import Settings
from tidegate.stack.ports import free_ports

pytestmark = pytest.mark.integration


class Served:
    """A server on a free port, whose lifespan records its end."""

    def __init__(self, busy: Callable[[], bool]) -> None:
        self.ended = False
        self.server = service.server_of(
            FastAPI(lifespan=self._lifespan), Settings(), free_ports(1)[0], busy=busy, signals=False
        )
        self.running = asyncio.create_task(self.server.serve())

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        yield
        self.ended = True


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(service, "RETIRE_S", 0.05)


async def test_it_ends_after_the_last_call_on_another_port(until):
    calls = ["a call of gRPC"]
    served = Served(lambda: bool(calls))
    await until(lambda: served.server.started)
    served.server._retire()
    await asyncio.sleep(0.5)
    assert not served.running.done()
    calls.clear()
    await served.running
    assert served.ended


async def test_a_stop_ends_the_wait_and_the_lifespan_ends_in_order(until):
    served = Served(lambda: True)
    await until(lambda: served.server.started)
    served.server._retire()
    await asyncio.sleep(0.5)
    served.server.handle_exit(signal.SIGTERM, None)
    await served.running
    assert served.ended

"""Connections to the broker, with each of the two drivers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial

import pytest

from tests.conftest import PATIENCE_S
from tests.integration.kernel.broker_peers import nothing
from tidegate.kernel.broker.connection import Connection
from tidegate.kernel.broker.topology import Queue, requests_queue


@pytest.fixture(params=["fast", "aio-pika"])
def make(request) -> Callable[..., Connection]:
    """Return a function that makes a connection with one of the two drivers."""
    return partial(Connection, fast=request.param == "fast")


@pytest.fixture
async def connect(make, rabbitmq_url) -> AsyncIterator[Callable]:
    """Return a function that opens a connection and waits until it is up. All stop after the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def opened(setup=nothing, url: str = rabbitmq_url, **how) -> Connection:
            connection = await stack.enter_async_context(make(url, "test", setup, **how))
            await connection.wait_up(PATIENCE_S)
            return connection

        yield opened


@pytest.fixture
def queue(fresh) -> Queue:
    return requests_queue(fresh("d"))

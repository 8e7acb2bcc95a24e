"""What the integration tests of several rooms stand on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.integration.kernel import s3 as s3_of
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.amqp.channel import AmqpChannel


@pytest.fixture
def blobs(tmp_path) -> Iterator[Blobs]:
    """A blob store of this test's own."""
    found = Blobs(f"file://{tmp_path / 'blobs'}")
    yield found
    found.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of the clients of an S3 server that belongs to this xdist worker."""
    with s3_of.running(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture
def s3(s3_server, monkeypatch, fresh) -> s3_of.S3:
    """A place in the S3 server of this test's own; this process reaches it."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return s3_of.S3(f"s3://{s3_of.BUCKET}/{fresh('store')}", s3_server)


@dataclass
class HeldUp:
    """``begun``: somebody begins to consume; ``go``: lets it."""

    begun: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event = field(default_factory=asyncio.Event)


@pytest.fixture
def hold_up(monkeypatch) -> Callable[[str], HeldUp]:
    """``hold_up(prefix)``: from now on who begins to consume a queue of that prefix has to wait."""

    def held_up(prefix: str) -> HeldUp:
        found, consume = HeldUp(), AmqpChannel.consume

        async def held(channel: AmqpChannel, queue: Any, *args: Any, **how: Any) -> str:
            if queue.name.startswith(prefix):
                found.begun.set()
                await found.go.wait()
            return await consume(channel, queue, *args, **how)

        monkeypatch.setattr(AmqpChannel, "consume", held)
        return found

    return held_up

"""What the integration tests of several rooms stand on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from redis.asyncio import Redis

from benchmarks import install
from tests.integration.kernel import s3 as s3_of
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.amqp.channel import AmqpChannel


@pytest.fixture(scope="session", autouse=True)
def patient_parts() -> Iterator[None]:
    """Wait longer for the store and for Triton than in production. A busy machine may stall for seconds.

    Tests of these limits set them themselves.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tidegate.kernel.store.connection.OPERATION_TIMEOUT_S", 30.0)
        patch.setattr("services.worker.adapters.triton_client.LIVE_TIMEOUT_S", 30.0)
        yield


@pytest.fixture
def blobs(tmp_path) -> Iterator[Blobs]:
    """A blob store of this test's own."""
    found = Blobs(f"file://{tmp_path / 'blobs'}")
    yield found
    found.close()


@pytest.fixture
async def redis(jobs_url) -> AsyncIterator[Redis]:
    """Yield a plain client of the store of jobs, which is empty."""
    found = Redis.from_url(jobs_url)
    await found.flushall()
    yield found
    await found.aclose()


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of the clients of rclone's S3 server, which belongs to this xdist worker."""
    with s3_of.rclone(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory) -> Iterator[dict[str, str]]:
    """The environment of the clients of moto's S3 server. Without its packages, the tests are skipped."""
    if not install.installed(s3_of.MOTO):
        pytest.skip(f"moto is not installed: python -m benchmarks.install --only {s3_of.MOTO}")
    with s3_of.moto(tmp_path_factory.mktemp("moto")) as environment:
        yield environment


@pytest.fixture
def s3_at(request, monkeypatch, fresh) -> Callable[[str], s3_of.S3]:
    """``s3_at(server)``: a place of this test's own in an S3 server; this process reaches it."""

    def reached(server: str) -> s3_of.S3:
        environment = request.getfixturevalue(f"{server}_server")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        place = s3_of.S3(f"s3://{s3_of.BUCKET}/{fresh('store')}", environment)
        place.forget_clients()
        return place

    return reached


@pytest.fixture(params=s3_of.SERVERS)
def s3(request, s3_at) -> s3_of.S3:
    """A place in each S3 server."""
    return s3_at(request.param)


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

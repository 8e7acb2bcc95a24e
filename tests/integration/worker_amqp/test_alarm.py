"""RabbitMQ short of memory stops reading from connections that publish, so the worker's replies wait."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_S
from tidegate.stack.rabbitmq import PLACES
from tidegate.stack.standalone import rabbitmq_running

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Yield a RabbitMQ for this module alone, and its folder: an alarm would delay other tests."""
    folder = tmp_path_factory.mktemp("rabbitmq")
    with rabbitmq_running(folder) as url:
        yield url, folder


@pytest.fixture
def rabbitmq_url(broker: tuple[str, Path]) -> str:
    return broker[0]


@pytest.fixture
def alarm(broker: tuple[str, Path]) -> Callable[[bool], Awaitable[None]]:
    """Yield ``await alarm(True)``, which raises a memory alarm; False clears it."""
    pid = int((broker[1] / "data" / "node.pid").read_text())
    node = dict(line.split("=", 1) for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if line)

    async def turn(on: bool) -> None:
        # Not the one on PATH: as root that would become another user, who may not ask this node.
        tool = next(place for place in PLACES if place.exists()).resolve().parent / "rabbitmqctl"
        limit = ["absolute", "1"] if on else ["0.9"]
        done = await asyncio.create_subprocess_exec(
            *(str(tool), "-n", node["RABBITMQ_NODENAME"], "set_vm_memory_high_watermark", *limit),
            env={**node, "PATH": os.environ["PATH"]},
        )
        assert await done.wait() == 0

    return turn


async def test_replies_wait_for_the_end_of_an_alarm(
    start, caller, make, shown, until, alarm, nothing_is_left
):
    """The broker takes the first reply of each connection. Then it blocks the connection, acks included."""
    worker = await start(max_rows=1)
    worker.model.open.clear()
    ids = await caller.send(*(make([n, n], timeout_s=PATIENCE_S) for n in range(8)))
    await until(lambda: worker.model.calls)
    await alarm(True)
    worker.model.open.set()
    await until(lambda: worker.requests.connection.channel.blocked)
    await asyncio.sleep(0.5)
    assert len(caller.replies) < len(ids), "there was no alarm"
    await alarm(False)
    await until(lambda: len(caller.replies) == len(ids))
    assert [shown(caller.reply(id_)) for id_ in ids] == [[[2 * n, 2 * n]] for n in range(8)]
    assert len(worker.model.calls) == len(ids), "one was run twice"
    await nothing_is_left(worker)


async def test_a_drain_does_not_wait_for_the_end_of_an_alarm(start, caller, make, until, alarm):
    worker = await start(max_rows=1)
    worker.model.open.clear()
    await caller.send(*(make([n, n]) for n in range(3)))
    await until(lambda: worker.model.calls)
    await alarm(True)
    worker.model.open.set()
    await until(lambda: worker.requests.connection.channel.blocked)
    async with asyncio.timeout(PATIENCE_S):
        await worker.requests.close()
        await worker.stop()
    await alarm(False)

"""Background tasks: kept while they run, logged when they fail, ended together."""

from __future__ import annotations

import asyncio
import gc

from tidegate.kernel import tasks
from tidegate.kernel.tasks import TaskSet


async def test_a_task_is_kept_while_it_runs_and_dropped_afterwards():
    owned, done = TaskSet(), asyncio.Event()
    owned.start(done.wait(), "waiting")
    await asyncio.sleep(0)
    gc.collect()
    assert [task.get_name() for task in owned] == ["waiting"]
    done.set()
    await asyncio.gather(*owned)
    assert len(owned) == 0


async def test_a_failed_task_is_logged_once_and_the_others_run_on(caplog):
    async def fail() -> None:
        raise ValueError("broken")

    owned = TaskSet()
    other = owned.start(asyncio.sleep(3600))
    await asyncio.wait({owned.start(fail(), "failing")})
    await asyncio.sleep(0)
    assert [(record.message, record.task) for record in caplog.records] == [
        ("a background task failed", "failing")
    ]
    assert list(owned) == [other]
    await owned.end()


async def test_end_waits_for_every_task_and_logs_no_cancellation(caplog):
    ended = []

    async def run(number: int) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0)
            ended.append(number)

    owned = TaskSet()
    for number in range(3):
        owned.start(run(number))
    await asyncio.sleep(0)
    await owned.end()
    assert sorted(ended) == [0, 1, 2]
    assert caplog.records == []


async def test_a_swallowed_cancellation_is_repeated(monkeypatch):
    monkeypatch.setattr(tasks, "CANCEL_AGAIN_S", 0.001)
    cancels = 0

    async def stubborn() -> None:
        nonlocal cancels
        while cancels < 3:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                cancels += 1

    task = asyncio.create_task(stubborn())
    await asyncio.sleep(0)
    await tasks.end(task, None)
    assert (task.done(), cancels) == (True, 3)

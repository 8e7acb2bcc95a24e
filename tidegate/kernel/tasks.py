"""Run asyncio tasks in the background and end them reliably."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from tidegate.kernel import telemetry

T = TypeVar("T")

CANCEL_AGAIN_S = 0.1

log = telemetry.logger(__name__)


class TaskSet:
    """The background tasks of one object.

    It keeps a reference to each running task, so that Python does not garbage-collect the task. It logs the
    error of a task that fails, because no code awaits these tasks.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[asyncio.Task[Any]]:
        return iter(tuple(self._tasks))

    def start(self, work: Coroutine[Any, Any, T], name: str | None = None) -> asyncio.Task[T]:
        """Run ``work`` as a task, and log the error if the task fails.

        The calling code must run in the event loop.
        """
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    def cancel(self) -> None:
        """Cancel all tasks without waiting for them."""
        for task in self._tasks:
            task.cancel()

    async def end(self) -> None:
        """Cancel all tasks and return when they have ended."""
        await end(*self._tasks)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", extra={"task": task.get_name()}, exc_info=error)


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks and wait until they have ended. Their results and exceptions are ignored.

    Each task is cancelled repeatedly until it ends, because a single cancellation can be lost. On Python
    3.11, ``asyncio.wait_for``, which the store's client uses, ignores a cancellation that arrives together
    with a result.
    """
    alive = {task for task in tasks if task is not None and not task.done()}
    while alive:
        for task in alive:
            task.cancel()
        _, alive = await asyncio.wait(alive, timeout=CANCEL_AGAIN_S)

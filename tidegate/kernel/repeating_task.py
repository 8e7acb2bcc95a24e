"""A background loop that repeats one step, with a pause between two runs of the step."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from tidegate.kernel import tasks, telemetry

log = telemetry.logger(__name__)

# The step returns the seconds until its next run; None: it runs again only when it is woken.
Step = Callable[[], Awaitable[float | None]]


class RepeatingTask:
    """A loop that runs ``step`` until it is stopped.

    A failed step is logged, and runs again after ``retry_s`` seconds.
    """

    def __init__(self, name: str, step: Step, *, retry_s: float = 1.0) -> None:
        self._name = name
        self._step = step
        self._retry_s = retry_s
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, after_s: float = 0.0) -> None:
        """Start the loop; the first step runs after ``after_s`` seconds."""
        self._task = asyncio.create_task(self._run(after_s), name=self._name)

    def wake(self) -> None:
        """End the pause between two runs. If the step runs now, it runs again immediately afterwards."""
        self._wake.set()

    async def stop(self) -> None:
        """Cancel the running step or the pause. Return when the loop has ended."""
        await tasks.end(self._task)

    async def _run(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        while True:
            self._wake.clear()
            try:
                pause_s = await self._step()
            except Exception:  # the loop must survive every error of a step
                log.exception("a background step failed; it will be retried", extra={"task": self._name})
                pause_s = self._retry_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause_s)

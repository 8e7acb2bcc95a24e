"""A background loop pauses, is woken, outlives a failing step, and ends."""

import asyncio
import math
from collections.abc import Iterator

import pytest

from tests.conftest import PATIENCE_S
from tidegate.kernel.repeating_task import RepeatingTask


class Steps:
    """A step that returns the given pauses, or raises them."""

    def __init__(self, *pauses: float | Exception | None) -> None:
        self._pauses: Iterator[float | Exception | None] = iter(pauses)
        self.ran = 0
        self.changed = asyncio.Event()

    async def __call__(self) -> float | None:
        self.ran += 1
        self.changed.set()
        pause = next(self._pauses, None)
        if isinstance(pause, Exception):
            raise pause
        return pause

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.ran < count:
                await self.changed.wait()
                self.changed.clear()


async def test_a_step_runs_again_after_its_pause():
    steps = Steps(0.0, 0.001)
    loop = RepeatingTask("test", steps)
    loop.start()
    await steps.reach(3)
    await asyncio.sleep(0.01)
    assert steps.ran == 3, "None waits until it is woken"
    await loop.stop()


async def test_wake_ends_the_pause():
    steps = Steps(None, math.inf)
    loop = RepeatingTask("test", steps)
    loop.start()
    await steps.reach(1)
    loop.wake()
    await steps.reach(2)
    loop.wake()
    await steps.reach(3)
    await loop.stop()


async def test_a_wake_during_a_step_is_not_lost():
    entered, leave = asyncio.Event(), asyncio.Event()
    ran = 0

    async def step() -> float | None:
        nonlocal ran
        ran += 1
        entered.set()
        await leave.wait()
        return None

    loop = RepeatingTask("test", step)
    loop.start()
    await entered.wait()
    loop.wake()
    leave.set()
    async with asyncio.timeout(PATIENCE_S):
        while ran < 2:
            await asyncio.sleep(0)
    await loop.stop()


async def test_a_step_that_fails_is_logged_and_runs_again(caplog: pytest.LogCaptureFixture):
    steps = Steps(RuntimeError("once"), None)
    loop = RepeatingTask("test", steps, retry_s=0.0)
    loop.start()
    await steps.reach(2)
    await loop.stop()
    assert "a background step failed" in caplog.text


async def test_the_first_step_may_wait():
    steps = Steps()
    loop = RepeatingTask("test", steps)
    loop.start(after_s=3600.0)
    await asyncio.sleep(0.01)
    assert steps.ran == 0
    await loop.stop()

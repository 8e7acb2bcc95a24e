"""Ending asyncio tasks for certain."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.1


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks and return when they have ended, whatever they ended with.

    One ``cancel()`` is not enough: on Python 3.11 ``asyncio.wait_for``, which the store's client uses,
    swallows a cancellation that meets a result.
    """
    alive = {task for task in tasks if task is not None and not task.done()}
    while alive:
        for task in alive:
            task.cancel()
        _, alive = await asyncio.wait(alive, timeout=AGAIN_S)

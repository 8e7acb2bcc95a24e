"""Lock a file, so that only one worker of a host at a time uses what the file protects."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

POLL_S = 0.05


@contextlib.asynccontextmanager
async def exclusive(lock: Path, on_wait: Callable[[], None] = lambda: None) -> AsyncIterator[None]:
    """Hold the lock on the file ``lock`` while the ``async with`` block runs.

    If another worker has the lock, call ``on_wait`` once and wait.
    """
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        waited = False
        while True:
            # Poll, because a thread that blocks in flock cannot be cancelled.
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if not waited:
                waited = True
                on_wait()
            await asyncio.sleep(POLL_S)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def try_exclusive(lock: Path) -> Iterator[bool]:
    """Try to lock the file ``lock`` for the ``with`` block, without waiting.

    Yield True if this worker has the lock. Yield False if another worker has it.
    """
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)

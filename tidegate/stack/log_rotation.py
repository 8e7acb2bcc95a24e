"""Keep the logs of the stack from growing without limit."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from pathlib import Path

LIMIT_BYTES = 50_000_000
EVERY_S = 30.0
ROTATED_BY_ITS_WRITER = "access.log"


async def keep_short(state: Path) -> None:
    """Shorten logs that are too large, every ``EVERY_S`` seconds, until cancelled."""
    while True:
        await asyncio.sleep(EVERY_S)
        await asyncio.to_thread(shorten, state / "log", LIMIT_BYTES)


def shorten(folder: Path, limit_bytes: int) -> None:
    """Copy each log that is larger than ``limit_bytes`` to ``<name>.log.1``, and empty the log.

    The log is not replaced by a new file, because the process that writes it keeps it open. Skip the log
    ``ROTATED_BY_ITS_WRITER``, because the process that writes it also rotates it.
    """
    for log in folder.glob("*.log"):
        if log.name == ROTATED_BY_ITS_WRITER:
            continue
        with contextlib.suppress(OSError):
            if log.stat().st_size > limit_bytes:
                shutil.copyfile(log, log.with_suffix(".log.1"))
                log.open("w").close()

"""Reads the ledger's gauge all the time while jobs run and parts are killed."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from pathlib import Path

from benchmarks.client import Client
from benchmarks.stack import Stack

NAME = b"tidegate_jobs_unaccounted "
EVERY_S = 0.5


class Gauge:
    """Counts the values of ``tidegate_jobs_unaccounted``; ``no answer``: the router did not respond."""

    def __init__(self, stack: Stack) -> None:
        self._client = Client(int(stack.env["TIDEGATE_ROUTER_PORT"]))
        token = (Path(stack.env["TIDEGATE_STATE_DIR"]) / "token").read_text().strip()
        self._headers = {"Authorization": f"Bearer {token}"}
        self.readings: Counter[str] = Counter()
        self.worst = 0.0
        self.last = math.nan

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    async def follow(self) -> None:
        """Read the gauge until cancelled."""
        while True:
            await self.read()
            await asyncio.sleep(EVERY_S)

    async def read(self) -> None:
        """Read the gauge once."""
        try:
            answer = await self._client.get("/metrics", self._headers)
        except (OSError, EOFError):
            self.readings["no answer"] += 1
            return
        lines = [line for line in answer.body.splitlines() if line.startswith(NAME)]
        self.last = float(lines[0].removeprefix(NAME)) if lines else math.nan
        kind = "unknown" if math.isnan(self.last) else "0" if self.last == 0 else "above 0"
        self.readings[kind] += 1
        if self.last > self.worst:
            self.worst = self.last

    async def settle(self, limit_s: float) -> bool:
        """Return True if the gauge reads 0 within ``limit_s``."""
        try:
            async with asyncio.timeout(limit_s):
                while True:
                    await self.read()
                    if self.last == 0:
                        return True
                    await asyncio.sleep(EVERY_S)
        except TimeoutError:
            return False

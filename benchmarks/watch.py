"""Read a Deployment's status from the autoscaler a few times a second, for a benchmark's curve."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.stack import Stack

EVERY_S = 0.25


@dataclass(frozen=True, slots=True)
class Look:
    """One reading of the status; ``at`` is in seconds from the beginning."""

    at: float
    desired: int
    ready: int
    starting: int
    demand: int | None


@dataclass(slots=True)
class Watch:
    """Reads the status of one Deployment while a benchmark runs; ``http``: a client of the autoscaler."""

    http: httpx.AsyncClient
    deployment: str
    begun: float = field(default_factory=time.monotonic)
    looks: list[Look] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)

    async def look(self) -> Look:
        """Read the status once."""
        answer = await self.http.get(f"/v1/deployments/{self.deployment}")
        answer.raise_for_status()
        self.status = answer.json()
        kept = (self.status[key] for key in ("desired", "ready", "starting", "demand"))
        self.looks.append(Look(time.monotonic() - self.begun, *kept))
        return self.looks[-1]

    async def until_ready(self, count: int, limit_s: float) -> None:
        """Wait until ``count`` replicas are ready and no others exist. Raise TimeoutError."""
        async with asyncio.timeout(limit_s):
            while True:
                found = await self.look()
                if found.ready == count == len(self.status["replicas"]):
                    return
                await asyncio.sleep(EVERY_S)

    async def run(self) -> None:
        """Read the status until cancelled."""
        while True:
            with contextlib.suppress(httpx.HTTPError):
                await self.look()
            await asyncio.sleep(EVERY_S)


@asynccontextmanager
async def watching(running: Stack, deployment: str) -> AsyncIterator[Watch]:
    """Return a watch on a Deployment of a running stack."""
    token = (running.state / "token").read_text().strip()
    url = f"http://127.0.0.1:{running.env['TIDEGATE_AUTOSCALER_PORT']}"
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=300) as http:
        yield Watch(http, deployment)

"""The worker, put together."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI

from services.worker.life import Life
from services.worker.settings import WorkerSettings
from tidegate.protocol.models import Assignment
from tidegate.service import create_app
from tidegate.store import JobStore, Store


class Worker:
    """One replica as a process with an HTTP door for health and metrics."""

    def __init__(self, settings: WorkerSettings, folder: Path, http_port: int) -> None:
        self._settings = settings
        self._folder = folder
        self._http_port = http_port
        self._life: Life | None = None
        self.app = create_app(name="worker", settings=settings, lifespan=self._lifespan, routers=[])

    @property
    def failed(self) -> bool:
        """Whether it ended because it could not serve."""
        return self._life is not None and self._life.failed

    async def drain(self) -> None:
        """The first step of an orderly stop."""
        if self._life is not None:
            await self._life.drain()

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        assignment = Assignment.model_validate_json((self._folder / "assignment.json").read_bytes())
        store, job_store = Store.connect(self._settings.redis_url), JobStore.connect(self._settings.jobs_url)
        life = self._life = Life(self._settings, assignment, self._folder, store, job_store, self._http_port)
        app.state.health.add("replica", life.problem)
        life.start()
        watcher = asyncio.create_task(_stop_when(life.ended))
        yield
        watcher.cancel()
        await life.stop()
        await store.close()
        await job_store.close()


async def _stop_when(ended: asyncio.Event) -> None:
    """A replica that cannot serve ends like one that was told to stop."""
    await ended.wait()
    os.kill(os.getpid(), signal.SIGTERM)

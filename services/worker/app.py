"""The worker, put together."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from starlette.applications import Starlette

from services.worker.adapters.triton_process import TritonProcess
from services.worker.application.lifecycle import ReplicaLifecycle
from services.worker.application.warm_standby import WarmStandby
from services.worker.settings import WorkerSettings
from tidegate.kernel import tasks
from tidegate.kernel.protocol.models import Assignment, WarmAssignment
from tidegate.kernel.service.app import bare_app
from tidegate.kernel.store import JobStore, Store


class Worker:
    """One replica as a process with an HTTP door for health and metrics; in a warm pool, not one yet."""

    def __init__(self, settings: WorkerSettings, folder: Path, http_port: int) -> None:
        self._settings = settings
        self._folder = folder
        self._http_port = http_port
        self._life: ReplicaLifecycle | None = None
        self._waiting: WarmStandby | None = None
        self.app = bare_app(name="worker", settings=settings, lifespan=self._lifespan)

    @property
    def failed(self) -> bool:
        """Whether it ended because it could not serve."""
        return any(each is not None and each.failed for each in (self._life, self._waiting))

    async def drain(self) -> None:
        """The first step of an orderly stop."""
        if self._life is not None:
            await self._life.drain()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        store, job_store = Store.connect(self._settings.redis_url), JobStore.connect(self._settings.jobs_url)
        start = read_start(self._folder)
        app.state.health.add("replica", self._problem)
        if isinstance(start, Assignment):
            self._life = self._begin(start, store, job_store, None)
        else:
            self._waiting = WarmStandby(self._settings, start, self._folder, store, self._http_port)
        whole = asyncio.create_task(self._run(store, job_store))
        yield
        await tasks.end(whole)
        for each in (self._life, self._waiting):
            if each is not None:
                await each.stop()
        await store.close()
        await job_store.close()

    async def _run(self, store: Store, job_store: JobStore) -> None:
        """Until it ends by itself: a replica that cannot serve ends like one that was told to stop."""
        if self._waiting is not None:
            found = await self._waiting.assignment()
            if found is not None:
                self._life, self._waiting = self._begin(found[0], store, job_store, found[1]), None
        if self._life is not None:
            await self._life.ended.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    def _begin(
        self, assignment: Assignment, store: Store, job_store: JobStore, triton: TritonProcess | None
    ) -> ReplicaLifecycle:
        token = read_token(self._folder)
        life = ReplicaLifecycle(
            self._settings, assignment, self._folder, store, job_store, self._http_port, token, triton
        )
        life.start()
        return life

    def _problem(self) -> str | None:
        if self._life is not None:
            return self._life.problem()
        return self._waiting.problem() if self._waiting is not None else "starting"


def read_start(folder: Path) -> Assignment | WarmAssignment:
    """What the launcher put there: the replica to be, or the flavour to wait as."""
    document = orjson.loads((folder / "assignment.json").read_bytes())
    kind = WarmAssignment if "flavour" in document else Assignment
    return kind.model_validate(document)


def read_token(folder: Path) -> str:
    """Return the replica's token, as the launcher wrote it; empty if it wrote none."""
    try:
        return (folder / "token").read_text().strip()
    except FileNotFoundError:
        return ""

"""Create the parts of a worker process.

The worker runs a replica or a scratch replica, or it waits in the warm pool to become a replica.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from starlette.applications import Starlette

from services.worker.adapters.call_traces import TRACES
from services.worker.adapters.triton_process import TritonProcess
from services.worker.application.lifecycle import ReplicaLifecycle
from services.worker.application.scratch_replica import ScratchReplica
from services.worker.application.warm_standby import WarmStandby
from services.worker.replica_wiring import build_replica, read_token
from services.worker.settings import WorkerSettings
from tidegate.kernel import tasks
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.protocol.models import Assignment
from tidegate.kernel.protocol.warm_pool import WarmAssignment
from tidegate.kernel.service.app import bare_app
from tidegate.kernel.store import JobStore, Store


class Worker:
    """A worker process, with an HTTP server for health and metrics.

    It runs a replica. A worker of the warm pool first waits until it learns which replica it becomes. A
    scratch replica first verifies a version. Then it can become a replica of this version.
    """

    def __init__(self, settings: WorkerSettings, folder: Path, http_port: int) -> None:
        self._settings = settings
        self._folder = folder
        self._http_port = http_port
        self._blobs: Blobs | None = None
        self._replica: ReplicaLifecycle | ScratchReplica | None = None
        self._standby: WarmStandby | None = None
        self.app = bare_app(name="worker", settings=settings, lifespan=self._lifespan)

    @property
    def failed(self) -> bool:
        """Return True if the worker ended because it could not serve."""
        return any(each is not None and each.failed for each in (self._replica, self._standby))

    async def drain(self) -> None:
        """Drain the replica: the first step of an orderly stop."""
        if self._replica is not None:
            await self._replica.drain()

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        store, job_store = Store.connect(self._settings.redis_url), JobStore.connect(self._settings.jobs_url)
        start = read_start(self._folder)
        app.state.health.add("replica", self._problem)
        if isinstance(start, Assignment) and start.scratch is not None:
            token = read_token(self._folder)
            self._replica = ScratchReplica(self._settings, start, self._folder, store, self._http_port, token)
            self._replica.start()
        elif isinstance(start, Assignment):
            self._start_replica(start, store, job_store, None)
        else:
            self._standby = WarmStandby(self._settings, start, self._folder, store, self._http_port)
        running = asyncio.create_task(self._run(store, job_store))
        yield
        await tasks.end(running)
        for each in (self._replica, self._standby):
            if each is not None:
                await each.stop()
        await asyncio.to_thread(TRACES.stop)
        if self._blobs is not None:
            self._blobs.close()
        await store.close()
        await job_store.close()

    async def _run(self, store: Store, job_store: JobStore) -> None:
        """Run until the replica has ended or the warm worker has failed. Then send this process SIGTERM.

        When a warm worker or a scratch replica gets an assignment, start the replica.
        """
        if self._standby is not None:
            assigned = await self._standby.wait_for_assignment()
            if assigned is not None:
                self._standby = None
                self._start_replica(assigned[0], store, job_store, assigned[1])
        if isinstance(self._replica, ScratchReplica):
            assigned = await self._replica.wait()
            if assigned is not None:
                self._start_replica(assigned[0], store, job_store, assigned[1])
        if self._replica is not None:
            await self._replica.ended.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    def _start_replica(
        self, assignment: Assignment, store: Store, job_store: JobStore, triton: TritonProcess | None
    ) -> None:
        self._blobs = Blobs(self._settings.blob_url)
        replica = self._replica = build_replica(
            self._settings,
            assignment,
            self._folder,
            store,
            job_store,
            self._blobs,
            self._http_port,
            triton,
        )
        TRACES.start(assignment.deployment.name, assignment.replica)
        replica.start()

    def _problem(self) -> str | None:
        if self._replica is not None:
            return self._replica.problem
        return self._standby.problem if self._standby is not None else "starting"


def read_start(folder: Path) -> Assignment | WarmAssignment:
    """Read the launcher's file. Return the replica to run, or the warm pool to wait in."""
    document = orjson.loads((folder / "assignment.json").read_bytes())
    kind = WarmAssignment if "flavour" in document else Assignment
    return kind.model_validate(document)

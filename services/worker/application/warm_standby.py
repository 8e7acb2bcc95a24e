"""A worker of the warm pool: Triton runs without a model until the worker is assigned a replica."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.worker.adapters.heartbeat import ReplicaHeartbeat
from services.worker.adapters.sandbox import sandbox_of
from services.worker.adapters.triton_command import TritonOptions
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import TritonProcess, new_triton
from services.worker.application.replica_status import ReplicaStatus
from services.worker.settings import WorkerSettings
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import warm_queue
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol.models import Assignment
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.warm_pool import WarmAssignment
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

STORE_RETRY_S = 0.1  # seconds between two tries to claim an offer, if the store fails


class WarmStandby:
    """Waits on the queue ``warm.v1.<pool>`` for offers to become a replica.

    The worker that claims an offer becomes the replica. Offers are handled one at a time.
    """

    def __init__(
        self, settings: WorkerSettings, start: WarmAssignment, folder: Path, store: Store, http_port: int
    ) -> None:
        self._settings = settings
        self._start = start
        self._folder = folder
        self._store = store
        self._http_port = http_port
        self._status = ReplicaStatus("starting Triton")
        self._launch_ms = round(max(0.0, self._status.started_at - start.launched_at) * 1000, 1)
        self._assigned: asyncio.Future[Assignment] = asyncio.get_running_loop().create_future()
        self._connection = Connection(settings.amqp_url, f"worker {start.replica}", self._on_setup)
        self._heartbeat = ReplicaHeartbeat(store, settings.heartbeat_interval_s, self._report)
        self._triton: TritonProcess | None = None
        self._sandbox = sandbox_of(settings, folder)
        self._claiming = asyncio.Lock()
        self._closed = False

    @property
    def failed(self) -> bool:
        """Return True if this worker cannot become a replica."""
        return self._status.failed

    @property
    def problem(self) -> str | None:
        """Return why this worker cannot become a replica now; None if it can."""
        return self._connection.problem if self._status.state == "warm" else self._status.problem

    async def wait_for_assignment(self) -> tuple[Assignment, TritonProcess] | None:
        """Wait until this worker is assigned a replica. Return the assignment and the running Triton.

        After an error, report it and return None.
        """
        self._heartbeat.start()
        try:
            triton = await self._start_triton()
            self._connection.start()
            await self._connection.wait_up(self._start.pool.start_timeout_s)
            self._status.set("warm")
            await self._heartbeat.beat()
            log.info("waiting for a model", extra={"flavour": self._start.pool_name})
            crash = asyncio.create_task(triton.wait())
            events: set[asyncio.Future[Any]] = {crash, self._assigned}
            try:
                await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await tasks.end(crash)
            if not self._assigned.done():
                raise Unavailable(f"Triton ended while the worker waited for an offer: {triton.tail()}")
        except Exception as error:
            message = error.message if isinstance(error, TidegateError) else f"unexpected error: {error!r}"
            self._status.fail(message)
            self._closed = True
            log.exception("the worker of the warm pool failed")
            await self._heartbeat.beat()
            return None
        await self._close()
        self._triton = None
        return self._assigned.result(), triton

    async def stop(self) -> None:
        """Stop consuming offers. Also stop Triton, unless this worker becomes a replica and still uses it."""
        await self._close()
        if self._triton is not None:
            await self._triton.stop(grace_s=0)

    async def _close(self) -> None:
        self._closed = True
        await self._connection.stop()
        await self._heartbeat.stop(forget=not self.failed)

    async def _start_triton(self) -> TritonProcess:
        install = TritonInstall.find(
            self._settings.runtime_path, self._settings.triton_server, self._settings.triton_backends
        )
        pool = self._start.pool
        # These options suit most Deployments. If a Deployment needs other options, its replica starts another
        # Triton.
        options = TritonOptions(
            replica=self._start.replica,
            threads=pool.threads,
            auto_complete=False,
            start_timeout_s=pool.start_timeout_s,
            log_bytes_per_s=self._settings.model_log_bytes_per_s,
        )
        self._triton = new_triton(install, self._folder, options, self._sandbox)
        await self._triton.start()
        return self._triton

    async def _on_setup(self, channel: Channel) -> None:
        queue = warm_queue(self._start.pool_name)
        await channel.declare(queue, bind=False)

        async def on_offer(delivery: Delivery) -> None:
            await self._answer_offer(channel, delivery)

        await channel.consume(queue, on_offer, prefetch=1)

    async def _answer_offer(self, channel: Channel, delivery: Delivery) -> None:
        """Try to claim an offer. Ack it when the store has recorded which worker claimed it."""
        try:
            offered = Assignment.model_validate_json(bytes(delivery.body))
        except ValidationError as error:
            log.error("an offer cannot be read", extra={"problem": str(error)})
            channel.ack(delivery.tag)
            return
        # If the channel has ended, the broker delivers the offer again.
        with contextlib.suppress(Unavailable):
            async with self._claiming:
                if await self._claim(offered):
                    channel.ack(delivery.tag)
                else:
                    channel.nack(delivery.tag)

    async def _claim(self, offered: Assignment) -> bool:
        """Claim an offer. Return True when the store has recorded which worker claimed it.

        Return False if this worker no longer waits for offers. If the store returns an error, the claim may
        still be recorded. Then no other worker can take the offer, so retry until the store answers.
        """
        while not self._closed and not self._assigned.done():
            try:
                worker = await self._store.claim_replica(offered.replica, self._start.replica)
            except StoreUnavailable:
                await asyncio.sleep(STORE_RETRY_S)
                continue
            if worker == self._start.replica and not self._closed:
                self._assigned.set_result(offered)
            return True
        return False

    def _report(self) -> ReplicaReport:
        return ReplicaReport(
            replica=self._start.replica,
            deployment=f"warm-{self._start.pool_name}-",
            generation=self._start.generation,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self._status.state,
            message=self._status.message,
            phases_ms={"launch": self._launch_ms},
            metrics_port=self._http_port,
            started_at=self._status.started_at,
            sandbox=self._sandbox.degree,
        )

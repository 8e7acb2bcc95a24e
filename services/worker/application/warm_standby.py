"""A worker of the warm pool: Triton up and no model, until it is told which replica it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from services.worker.adapters.heartbeat import Heartbeat
from services.worker.adapters.sandbox import sandbox_of
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import TritonOptions, TritonProcess, new_triton
from services.worker.settings import WorkerSettings
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.broker.connection import Channel, Connection, Delivery
from tidegate.kernel.broker.topology import warm_queue
from tidegate.kernel.errors import TidegateError, Unavailable
from tidegate.kernel.protocol.models import Assignment, WarmAssignment
from tidegate.kernel.protocol.presence import ReplicaReport, ReplicaState
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

STORE_AWAY_S = 0.1  # between the questions whose an offer is, while the store does not answer


class WarmStandby:
    """Waits on ``warm.v1.<flavour>`` with one offer in hand at a time. ``failed``: nothing can come of it."""

    def __init__(
        self, settings: WorkerSettings, start: WarmAssignment, folder: Path, store: Store, http_port: int
    ) -> None:
        self._settings = settings
        self._start = start
        self._folder = folder
        self._store = store
        self._http_port = http_port
        self._started_at = time.time()
        self._launch_ms = round(max(0.0, self._started_at - start.launched_at) * 1000, 1)
        self._state: ReplicaState = "starting"
        self._message = "starting Triton"
        self._taken: asyncio.Future[Assignment] = asyncio.get_running_loop().create_future()
        self._connection = Connection(settings.amqp_url, f"worker {start.replica}", self._listen)
        self._heartbeat = Heartbeat(store, settings.heartbeat_interval_s, self._report)
        self._triton: TritonProcess | None = None
        self._sandbox = sandbox_of(settings, folder)
        self._answering = asyncio.Lock()
        self._closed = False
        self.failed = False

    def problem(self) -> str | None:
        """Why no replica can be had of it, if so."""
        return f"{self._state}: {self._message}" if self._state != "warm" else self._connection.problem

    async def assignment(self) -> tuple[Assignment, TritonProcess] | None:
        """What to be from now on, and the Triton to be it with; None: it failed, as its heartbeat says."""
        self._heartbeat.start()
        try:
            triton = await self._start_triton()
            self._connection.start()
            await self._connection.wait_up(self._start.pool.start_timeout_s)
            self._state, self._message = "warm", ""
            await self._heartbeat.beat()
            log.info("waiting for a model", extra={"flavour": self._start.flavour})
            crash = asyncio.create_task(triton.wait())
            events: set[asyncio.Future[Any]] = {crash, self._taken}
            try:
                await asyncio.wait(events, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await tasks.end(crash)
            if not self._taken.done():
                raise Unavailable(f"Triton ended while it waited: {triton.tail()}")
        except Exception as error:
            told = error.message if isinstance(error, TidegateError) else f"unexpected error: {error!r}"
            self._state, self._message, self.failed, self._closed = "failed", told, True, True
            log.exception("cannot wait for a model")
            await self._heartbeat.beat()
            return None
        await self._close()
        self._triton = None
        return self._taken.result(), triton

    async def stop(self) -> None:
        """Take no offers any more, and end the Triton that was not handed on."""
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
        # As most Deployments need it; one that needs it otherwise starts its own in a moment.
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

    async def _listen(self, channel: Channel) -> None:
        queue = warm_queue(self._start.flavour)
        await channel.declare(queue, bind=False)

        async def on_offer(delivery: Delivery) -> None:
            await self._answer(channel, delivery)

        await channel.consume(queue, on_offer, prefetch=1)

    async def _answer(self, channel: Channel, delivery: Delivery) -> None:
        """Take an offer, unless somebody else did. It is acked once that is settled."""
        try:
            offered = Assignment.model_validate_json(bytes(delivery.body))
        except ValidationError as error:
            log.error("an offer cannot be read", extra={"problem": str(error)})
            channel.ack(delivery.tag)
            return
        # Where the channel is over, an offer that is not settled comes again.
        with contextlib.suppress(Unavailable):
            async with self._answering:
                if await self._take(offered):
                    channel.ack(delivery.tag)
                else:
                    channel.nack(delivery.tag)

    async def _take(self, offered: Assignment) -> bool:
        """Whether it is settled whose the offer is; it is not where this worker takes none any more.

        An answer of the store that was lost may have said that it is ours, and then nobody else takes it: so
        the store is asked until it answers, as long as this worker waits.
        """
        while not self._closed and not self._taken.done():
            try:
                worker = await self._store.claim_replica(offered.replica, self._start.replica)
            except StoreUnavailable:
                await asyncio.sleep(STORE_AWAY_S)
                continue
            if worker == self._start.replica and not self._closed:
                self._taken.set_result(offered)
            return True
        return False

    def _report(self) -> ReplicaReport:
        return ReplicaReport(
            replica=self._start.replica,
            deployment=f"warm-{self._start.flavour}-",
            generation=self._start.generation,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self._state,
            message=self._message,
            phases_ms={"launch": self._launch_ms},
            metrics_port=self._http_port,
            started_at=self._started_at,
            sandbox=self._sandbox.degree,
        )

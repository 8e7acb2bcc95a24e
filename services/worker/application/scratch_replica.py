"""Load a version in a Triton of its own, check and measure the version, and report the outcome.

A scratch replica opens no queue, so it never gets a request. Its heartbeats report the outcome until the
autoscaler ends it. If the version is verified, the worker can become the first replica of a Deployment. Then
the worker and Triton keep running.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from services.worker.adapters.cpu_model import cpu_model
from services.worker.adapters.heartbeat import ReplicaHeartbeat
from services.worker.adapters.model_processes import model_processes
from services.worker.adapters.process_table import memory_mb
from services.worker.adapters.sandbox import sandbox_of
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_process import TritonProcess, new_triton
from services.worker.adapters.warmup import warm_up
from services.worker.application.preparation import Preparation, PreparedModel
from services.worker.application.replica_status import ReplicaStatus
from services.worker.application.version_check import VersionCheck
from services.worker.domain import capacity_card
from services.worker.domain.concurrency import call_limits
from services.worker.domain.deaths import SERVER, Death
from services.worker.domain.load_failures import DIED
from services.worker.domain.phases import Phases
from services.worker.settings import WorkerSettings
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import ModelFailed, TidegateError, Unavailable
from tidegate.kernel.protocol.models import Assignment, Signature
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.redaction import without_paths
from tidegate.kernel.protocol.verification import MAX_MESSAGE, CapacityCard, ScratchOutcome
from tidegate.kernel.store import Store, StoreUnavailable

log = telemetry.logger(__name__)

# The autoscaler ends a scratch replica when it has read the outcome. If the autoscaler is away, the replica
# ends itself after this many seconds.
REPORT_S = 120.0
EXIT_S = 1.0
OFFER_POLL_S = 0.05
UNLOAD_S = 10.0


class ScratchReplica:
    """A scratch replica, from its start to its end.

    ``ended``: an event that is set when the worker should exit, or when it becomes a replica of a Deployment.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        assignment: Assignment,
        folder: Path,
        store: Store,
        http_port: int,
        token: str,
    ) -> None:
        assert assignment.scratch is not None
        self._assignment = assignment
        self._task_of_version = assignment.scratch
        self._deployment = assignment.deployment
        self._registry_url, self._token = settings.registry_url, token
        self._folder = folder
        self._http_port = http_port
        self._status = ReplicaStatus("starting")
        self._phases = Phases(time.perf_counter)
        self._sandbox = sandbox_of(settings, folder)
        self._preparation = Preparation(
            settings, assignment, folder, self._sandbox, self._phases, self._status.step
        )
        self._store = store
        self._heartbeat = ReplicaHeartbeat(store, settings.heartbeat_interval_s, self._report)
        self._triton: TritonProcess | None = None
        self._client: TritonClient | None = None
        self._outcome: ScratchOutcome | None = None
        self._models: list[str] = []
        self._running: asyncio.Task[None] | None = None
        self._assigned: Assignment | None = None
        self.ended = asyncio.Event()

    @property
    def failed(self) -> bool:
        """Return False, because every outcome is a valid result of a scratch replica."""
        return False

    @property
    def problem(self) -> str | None:
        """Return the present step as the problem, because a scratch replica is never ready."""
        return self._status.problem

    def start(self) -> None:
        """Start the verification in the background."""
        self._phases.record("launch", time.time() - self._assignment.launched_at)
        self._heartbeat.start()
        self._running = asyncio.create_task(self._run(), name="scratch")

    async def drain(self) -> None:
        """End immediately: there are no requests to finish."""
        self.ended.set()

    async def wait(self) -> tuple[Assignment, TritonProcess] | None:
        """Wait until this scratch replica ends. Return its next assignment and the running Triton.

        Return None if the worker must exit.
        """
        await self.ended.wait()
        if self._assigned is None or self._triton is None:
            return None
        triton, self._triton = self._triton, None
        await self.stop()
        return self._assigned, triton

    async def stop(self) -> None:
        """Stop all parts. Also stop Triton, unless a replica uses it."""
        await tasks.end(self._running)
        if self._client is not None:
            await self._client.close()
        if self._triton is not None:
            await self._triton.stop(grace_s=0)
        if self._assigned is None:  # otherwise, a replica of this process uses the same files
            self._preparation.close()
        await self._heartbeat.stop(forget=self._assigned is not None)

    async def _run(self) -> None:
        self._outcome = await self._verified()
        log.info("verified", extra={"outcome": self._outcome.model_dump(mode="json")})
        self._status.step(self._outcome.kind)
        await self._heartbeat.beat()
        try:
            async with asyncio.timeout(REPORT_S):
                if self._outcome.kind == "verified":
                    self._assigned = await self._offer()
                else:
                    await asyncio.Event().wait()
        except TimeoutError:
            log.info("the autoscaler did not end this scratch replica in time")
        self.ended.set()

    async def _offer(self) -> Assignment:
        """Wait for an offer to become a replica, and claim the offer. Return the replica's assignment.

        Before the claim, wait until the processes of the verified model have ended. Otherwise the new replica
        would count their end as a crash of its own model.
        """
        await self._unload()
        while self._triton is not None and model_processes(self._triton.pid, self._triton.descendants()):
            await asyncio.sleep(OFFER_POLL_S)
        while True:
            with contextlib.suppress(StoreUnavailable):
                raw = await self._store.offered(self._assignment.replica)
                if raw is not None:
                    offered = Assignment.model_validate_json(raw)
                    worker = await self._store.claim_replica(offered.replica, self._assignment.replica)
                    if worker == self._assignment.replica:
                        return offered
            await asyncio.sleep(OFFER_POLL_S)

    async def _unload(self) -> None:
        """Unload the models. The replica loads them again, with its own options."""
        if self._client is not None:
            for model in reversed(self._models):
                with contextlib.suppress(TidegateError):
                    await self._client.unload(model, UNLOAD_S)

    async def _verified(self) -> ScratchOutcome:
        limit_s = self._deployment.start_timeout_s
        try:
            return await self._verify(limit_s)
        except TimeoutError:
            # Reject the version only if its model is already prepared. Before that, a slow artifact store may
            # have caused the timeout.
            return self._outcome_of(
                "rejected" if self._models else "interrupted",
                f"The version did not load within {limit_s:g} s; the last step: {self._status.message}.",
            )
        except ModelFailed as error:
            return self._outcome_of("died" if error.message.startswith(DIED) else "rejected", error.message)
        except TidegateError as error:
            if (death := await self._death()) is not None:
                return self._outcome_of("died", death)
            fetching = isinstance(error, Unavailable) and not self._models
            return self._outcome_of("unavailable" if fetching else "interrupted", error.message)
        except Exception as error:
            log.exception("unexpected end")
            return self._outcome_of("interrupted", f"unexpected error: {error!r}")

    async def _verify(self, limit_s: float) -> ScratchOutcome:
        install = await self._preparation.install()
        async with asyncio.timeout(limit_s):
            prepared = await self._preparation.prepare(install, self._registry_url, self._token)
            self._models = prepared.models
            client = await self._load(prepared)
            model = prepared.models[-1]
            signature = await self._signature(client, model)
            instances = await client.instances(model)
            limits = call_limits(self._deployment, signature, instances)
            stateful = (await client.config(model)).HasField("sequence_batching")
            with self._phases.measure("warm_up"):
                await warm_up(client, model, signature, max_batch=limits.max_rows or None)
        start_s = time.time() - self._assignment.launched_at
        self._status.step("checking its answers")
        check = VersionCheck(client, model, signature, limits.max_rows or None, stateful=stateful)
        await check.check(self._task_of_version.samples)
        self._status.step("measuring it")
        batches = await check.measure(instances)
        card = CapacityCard(
            requests_per_s=capacity_card.requests_per_s(batches),
            batches=batches,
            memory_mb=self._memory_mb(),
            load_ms=self._phases.ms.get("load", 0.0),
            start_s=round(max(0.0, start_s - self._phases.ms.get("environment", 0.0) / 1e3), 3),
            cpu=cpu_model(),
            cores=os.cpu_count() or 0,
            device=prepared.loader.device,
            measured_at=datetime.now(UTC),
        )
        return self._outcome_of("verified", check.caveat, card)

    async def _load(self, prepared: PreparedModel) -> TritonClient:
        self._status.step("starting Triton")
        triton = self._triton = new_triton(prepared.install, self._folder, prepared.options, self._sandbox)
        with self._phases.measure("triton_start"):
            await triton.start()
        client = self._client = TritonClient(triton.target, triton.http)
        self._status.step("loading the model")
        with self._phases.measure("load"):
            await prepared.loader.load(client, prepared.models, triton.tail)
        return client

    async def _signature(self, client: TritonClient, model: str) -> Signature:
        """Return the registered signature, or Triton's signature if none is registered.

        The field ``decoupled`` always comes from Triton.
        """
        loaded = await client.signature(model)
        registered = self._assignment.version.signature or loaded
        return registered.model_copy(update={"decoupled": loaded.decoupled})

    async def _death(self) -> str | None:
        """Return a text about how Triton or a process of the model ended; None if all processes still run."""
        triton, client = self._triton, self._client
        if triton is None or client is None:
            return None
        with contextlib.suppress(TimeoutError):  # the kernel may report Triton's end late
            async with asyncio.timeout(EXIT_S):
                code = await triton.wait()
                death = Death(SERVER, time.time(), code, triton.ran_out_of_memory).description
                return f"While the version was verified, {death}. The end of Triton's log:\n{triton.tail()}"
        if client.model_died:
            return f"The model's process ended during a call. The end of Triton's log:\n{triton.tail()}"
        return None

    def _memory_mb(self) -> int:
        assert self._triton is not None
        return memory_mb([os.getpid(), self._triton.pid, *self._triton.descendants()])

    def _outcome_of(self, kind: str, message: str, card: CapacityCard | None = None) -> ScratchOutcome:
        shown = without_paths(message).strip()[:MAX_MESSAGE]
        return ScratchOutcome.model_validate(
            {"round": self._task_of_version.round, "kind": kind, "message": shown, "card": card}
        )

    def _report(self) -> ReplicaReport:
        return ReplicaReport(
            replica=self._assignment.replica,
            deployment=self._assignment.replica.rsplit("-", 2)[0],
            generation=self._assignment.generation,
            host=socket.gethostname(),
            pid=os.getpid(),
            state="starting",
            message=self._status.message,
            phases_ms=dict(self._phases.ms),
            metrics_port=self._http_port,
            started_at=self._status.started_at,
            sandbox=self._sandbox.degree,
            memory_limit=self._triton.memory_limit if self._triton else "",
            scratch=self._outcome.model_dump(mode="json") if self._outcome else None,
        )

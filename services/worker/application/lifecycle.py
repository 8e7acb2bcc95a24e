"""The life of a replica: install, fetch, start Triton, load, warm up, serve, supervise, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from services.worker.adapters.engine_facts import EngineFacts
from services.worker.adapters.gpu_load import GpuLoad
from services.worker.adapters.heartbeat import ReplicaHeartbeat
from services.worker.adapters.host_load import HostLoad
from services.worker.adapters.metrics import IN_HAND
from services.worker.adapters.model import Model
from services.worker.adapters.model_report import ModelReport
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.adapters.sandbox import sandbox_of
from services.worker.adapters.time_report import TimeReport
from services.worker.adapters.triton_process import TritonProcess
from services.worker.application.batch_scheduler import OnLost
from services.worker.application.preparation import Preparation
from services.worker.application.replica_status import ReplicaStatus
from services.worker.application.serving import ReplicaServing
from services.worker.application.triton_supervisor import TritonSupervisor
from services.worker.domain.concurrency import CallLimits
from services.worker.domain.deaths import Death
from services.worker.domain.phases import Phases
from services.worker.domain.time_ledger import TimeLedger
from services.worker.settings import WorkerSettings
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.models import Assignment, SequenceSpec
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.redaction import told
from tidegate.kernel.store import Store

log = telemetry.logger(__name__)

DRAIN_POLL_S = 0.005

Build = Callable[[CallLimits, OnLost, SequenceSpec | None], ReplicaServing]


class ReplicaLifecycle:
    """One replica from its start to its end. ``ended`` is set when the process should exit.

    ``token`` lets the replica download the artifact from the registry. ``build`` is called after the model is
    loaded, and creates the parts that run requests.

    ``triton`` is a Triton that runs already, for example in a worker of the warm pool. If it suits the model,
    the replica uses it, and stops it at the end. Otherwise the replica stops it and starts another Triton.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        assignment: Assignment,
        folder: Path,
        store: Store,
        http_port: int,
        token: str,
        publisher: ReplyPublisher,
        build: Build,
        triton: TritonProcess | None = None,
    ) -> None:
        self._registry_url, self._token = settings.registry_url, token
        self._assignment = assignment
        self._deployment = assignment.deployment
        self._http_port = http_port
        self._publisher = publisher
        self._build = build
        self._serving: ReplicaServing | None = None
        self._task: asyncio.Task[None] | None = None
        self._status = ReplicaStatus("starting")
        self._phases = Phases(time.perf_counter)
        self._sandbox = triton.sandbox if triton is not None else sandbox_of(settings, folder)
        self._preparation = Preparation(
            settings, assignment, folder, self._sandbox, self._phases, self._status.step
        )
        self._model_report = ModelReport(store, self._deployment.name)
        self._triton = TritonSupervisor(
            self._deployment,
            folder,
            self._sandbox,
            self._model_report,
            self._phases,
            signature=assignment.version.signature,
            shared_memory_above_bytes=settings.shared_memory_above_bytes,
            on_step=self._status.step,
            on_death=self._on_death,
            caller_timeouts_s=self._caller_timeouts_s,
            triton=triton,
        )
        self._gpus = GpuLoad(lambda: self._triton.metrics_port)
        self._host_load = HostLoad()
        self._engine = EngineFacts()
        self._time = TimeLedger(max(0, int((time.time() - assignment.launched_at) * 1e9)))
        self._time_report = TimeReport(store, assignment.replica, self._deployment.name)
        self._heartbeat = ReplicaHeartbeat(store, settings.heartbeat_interval_s, self._report)
        self.ended = asyncio.Event()
        IN_HAND.set_function(lambda: self._in_hand)

    @property
    def failed(self) -> bool:
        """Return True if the replica could not serve."""
        return self._status.failed

    @property
    def problem(self) -> str | None:
        """Return why this replica does not serve; None if it does."""
        if self._status.state != "ready" or self._serving is None:
            return self._status.problem
        if self._triton.probing:
            return "Triton does not answer"
        return self._serving.problem

    def start(self) -> None:
        """Start the replica in the background."""
        self._phases.record("launch", time.time() - self._assignment.launched_at)
        self._heartbeat.start()
        self._time_report.start(self._time)
        self._publisher.connection.start()
        self._task = asyncio.create_task(self._run(), name="life")

    async def _run(self) -> None:
        start_timeout_s = self._deployment.start_timeout_s
        try:
            install = await self._preparation.install()
            async with asyncio.timeout(start_timeout_s):
                prepared = await self._preparation.prepare(install, self._registry_url, self._token)
                await self._triton.configure(prepared)
                model = await self._triton.start()
            serving = await self._serve(model)
            await serving.open(self._draining)
            await self._heartbeat.beat()
            await self._supervise(serving)
        except TimeoutError:
            step = self._status.message
            await self._fail(f"The replica was not ready within {start_timeout_s:g} s; its last step: {step}")
        except TidegateError as error:
            await self._fail(error.message)
        except Exception as error:
            log.exception("unexpected end")
            await self._fail(f"unexpected error: {error!r}")

    async def _serve(self, model: Model) -> ReplicaServing:
        """Connect to the broker and start the schedulers. Nothing is consumed yet."""
        serving = self._serving = self._build(self._triton.limits, self._on_lost, self._triton.sequences)
        self._model_report.tally = serving.scheduler.stats.counts
        serving.scheduler.stats.time = self._time
        self._gpus.start()
        self._use(serving, model)
        serving.start()
        self._status.step("waiting for RabbitMQ")
        await serving.wait_up(self._deployment.start_timeout_s)
        self._status.set("ready", self._triton.caveat)
        self._time.serve(True)
        log.info("ready", extra={"phases_ms": self._phases.ms})
        return serving

    async def _supervise(self, serving: ReplicaServing) -> None:
        """Start Triton again each time it ends. After repeated quick deaths, wait before the start."""
        while True:
            code = await self._triton.wait()
            serving.scheduler.lose_model()
            death, pause_s = self._triton.record_death(code, excused=serving.scheduler.suspect_died)
            self._report_loss(death.words)
            await asyncio.gather(self._heartbeat.beat(), serving.close())
            serving.requests.requeue_waiting()
            model = await self._triton.restart(pause_s, self._draining)
            self._use(serving, model)
            self._status.set("ready", self._triton.caveat)
            self._time.serve(True)
            await serving.open(self._draining)
            self._publisher.suspected.set()  # SuspectConsumer now runs suspects that this worker published
            await self._heartbeat.beat()

    async def drain(self) -> None:
        """Stop consuming, and finish the work that this worker has, for up to ``drain_limit_s`` seconds.

        The work is its requests, its jobs, and the sequences that it keeps. If Triton crashes during this
        time, it is started again to finish the work. At the end, set ``ended``.
        """
        self._status.draining = True
        serving = self._serving
        if serving is not None and not self.failed:
            self._status.set("draining", "asked to stop")
            await self._heartbeat.beat()
            await serving.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._deployment.drain_limit_s):
                    while serving.busy and not self.ended.is_set():
                        await asyncio.sleep(DRAIN_POLL_S)
        self.ended.set()

    async def stop(self) -> None:
        """Stop all parts. Triton stops after the parts that call it."""
        await tasks.end(self._task)
        await self._triton.stop_watching()
        await self._gpus.stop()
        await self._engine.stop()
        if self._serving is not None:
            await self._serving.stop()
        await self._publisher.connection.stop()
        await self._model_report.stop()
        await self._triton.stop()
        self._preparation.close()
        await self._time_report.stop()
        await self._heartbeat.stop(forget=not self.failed)

    async def _fail(self, message: str) -> None:
        shown = told(message)
        self._status.fail(shown.message)
        more = {"traceback": shown.traceback} if shown.traceback else {}
        log.error("replica failed", extra={"problem": shown.message} | more)
        await self._heartbeat.beat()
        self.ended.set()

    # --- events of the model ---------------------------------------------------------------------------

    def _use(self, serving: ReplicaServing, model: Model) -> None:
        """Let the scheduler call a model that was just loaded, and watch the model's processes."""
        self._triton.watch(model)
        serving.scheduler.use(model)
        if self._assignment.version.format == "llm":
            self._engine.use(model)

    def _on_lost(self, model: Model) -> None:
        """Check in the background, after a lost call, if Triton still runs.

        The kernel may report the end of Triton late. So it is not known yet whether only the call was lost.
        """
        self._triton.probe(model, self._on_connection_lost)

    def _on_connection_lost(self, model: Model) -> None:
        """Call the model again, because Triton still runs: only the connection of the lost call broke."""
        assert self._serving is not None
        self._publisher.loss = "the connection to the model server broke"
        self._serving.scheduler.use(model)

    def _on_death(self, death: Death) -> None:
        """Stop calling a model after one of its processes died.

        After this, the watchdog kills Triton, and :meth:`_supervise` starts it again.
        """
        assert self._serving is not None
        self._serving.scheduler.lose_model()
        self._report_loss(death.description)

    def _report_loss(self, description: str) -> None:
        self._engine.lose()
        self._time.serve(False)
        self._publisher.loss = description
        self._status.set("starting", f"{description}; Triton is started again")

    # --- state -----------------------------------------------------------------------------------------

    def _draining(self) -> bool:
        return self._status.draining

    @property
    def _in_hand(self) -> int:
        return self._serving.scheduler.in_hand if self._serving else 0

    def _caller_timeouts_s(self) -> Sequence[float]:
        return self._serving.scheduler.caller_timeouts_s() if self._serving else ()

    def _report(self) -> ReplicaReport:
        """Return what the heartbeat reports."""
        status, triton, serving = self._status, self._triton, self._serving
        stats = serving.scheduler.stats if serving else None
        return ReplicaReport(
            replica=self._assignment.replica,
            deployment=self._deployment.name,
            generation=self._assignment.generation,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=status.state,
            message=status.message or triton.contradiction,
            phases_ms=dict(self._phases.ms),
            inflight=self._in_hand - (serving.scheduler.copies if serving else 0),
            completed=stats.completed if stats else 0,
            failed=stats.failed if stats else 0,
            busy_ms=stats.busy_s * 1e3 if stats else 0.0,
            call_ms=stats.call_ms.value if stats else None,
            batch_mean=stats.batch.value if stats else None,
            parallel=serving.scheduler.effective_concurrency if serving else 1.0,
            metrics_port=self._http_port,
            started_at=status.started_at,
            signature=triton.signature.model_dump() if triton.signature else None,
            jobs=serving.unsettled_jobs if serving else 0,
            gpu_utilization=self._gpus.utilization,
            gpu_memory_bytes=self._gpus.memory_bytes,
            device=triton.device,
            sandbox=self._sandbox.degree,
            memory_limit=triton.memory_limit,
            ready_at=status.ready_at,
            death=triton.last_death,
            llm=self._engine.report,
            holds=serving.requests.holds if serving else 0,
            host_busy=self._host_load.read(),
            sequences=serving.scheduler.kept_sequences if serving else 0,
            sequence_slots=serving.scheduler.sequence_slots if serving else 0,
        )

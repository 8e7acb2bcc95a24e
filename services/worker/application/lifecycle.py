"""A worker's life: environment, fetch, start Triton, load, warm up, serve; mend Triton; drain; end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from functools import partial
from pathlib import Path

from services.worker.adapters import model_repository
from services.worker.adapters.artifacts import ArtifactCache
from services.worker.adapters.environments import Environments
from services.worker.adapters.gpus import Gpus
from services.worker.adapters.heartbeat import Heartbeat
from services.worker.adapters.metrics import IN_HAND, TRITON_RESTARTS
from services.worker.adapters.model import Model
from services.worker.adapters.model_report import ModelReport
from services.worker.adapters.reply_publisher import ReplyPublisher
from services.worker.adapters.sandbox import sandbox_of
from services.worker.adapters.shared_memory import Regions
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_install import TritonInstall
from services.worker.adapters.triton_process import TritonOptions, TritonProcess, new_triton, repository_in
from services.worker.adapters.warmup import warm_up
from services.worker.api.jobs import JobConsumer
from services.worker.api.requests import RequestConsumer
from services.worker.application.batch_scheduler import BatchScheduler
from services.worker.application.job_leases import JobLeases
from services.worker.application.job_results import JobResults
from services.worker.application.job_scheduler import JobScheduler
from services.worker.application.model_loader import ModelLoader
from services.worker.application.model_watchdog import ModelWatchdog
from services.worker.domain.concurrency import effective_concurrency
from services.worker.domain.deaths import Death
from services.worker.domain.formats import config_is_complete
from services.worker.domain.output_check import OutputCheck
from services.worker.domain.phases import Phases
from services.worker.settings import WorkerSettings
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.blobs.claims import Claims
from tidegate.kernel.blobs.store import Blobs
from tidegate.kernel.broker.topology import requests_queue
from tidegate.kernel.errors import TidegateError
from tidegate.kernel.protocol.models import Assignment, Signature
from tidegate.kernel.protocol.presence import ReplicaReport, ReplicaState
from tidegate.kernel.protocol.redaction import told
from tidegate.kernel.store import JobStore, Store

log = telemetry.logger(__name__)

STREAMS = 16


class ReplicaLifecycle:
    """One replica from its start to its end. ``ended`` is set when the process should go.

    ``token`` opens the artifact at the registry. ``triton`` is one that was started ahead; it is ended with
    the replica, used or not.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        assignment: Assignment,
        folder: Path,
        store: Store,
        job_store: JobStore,
        http_port: int,
        token: str,
        triton: TritonProcess | None = None,
    ) -> None:
        self._settings = settings
        self._token = token
        self._assignment = assignment
        self._deployment = assignment.deployment
        self._folder = folder
        self._http_port = http_port
        self._started_at = time.time()
        self._ready_at = 0.0
        self._phases = Phases(time.perf_counter)
        self._state: ReplicaState = "starting"
        self._message = "starting"
        self._output_check: OutputCheck | None = None
        self._draining = False
        self._signature: Signature | None = assignment.version.signature
        # Until the model is loaded: its own configuration may say another number.
        self._instances = assignment.deployment.instances
        self._triton = triton
        self._sandbox = triton.sandbox if triton is not None else sandbox_of(settings, folder)
        self._client: TritonClient | None = None
        self._regions: Regions | None = None
        self._task: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._scheduler: BatchScheduler | None = None
        queue = requests_queue(self._deployment.name)
        self._blobs = Blobs(settings.blob_url)
        claims = self._claims = Claims(self._blobs, settings.claim_above_bytes)
        self._publisher = ReplyPublisher(settings.amqp_url, queue, claims)
        self._requests = RequestConsumer(
            settings.amqp_url,
            queue,
            assignment.replica,
            self._publisher,
            claims=claims,
            fetch_bytes=settings.max_fetched_bytes,
        )
        self._job_store = job_store
        self._messages: JobConsumer | None = None
        self._leases: JobLeases | None = None
        self._heartbeat = Heartbeat(store, settings.heartbeat_interval_s, self._report)
        self._model_report = ModelReport(store, self._deployment.name)
        self._loading: ModelLoader | None = None
        self._watch = ModelWatchdog(
            self._deployment.progress_timeout_s,
            self._died,
            lambda: self._scheduler.waiting() if self._scheduler else (),
        )
        self._gpus = Gpus(lambda: self._triton.metrics_port if self._triton else 0)
        self.ended = asyncio.Event()
        self.failed = False
        IN_HAND.set_function(lambda: self._scheduler.in_hand if self._scheduler else 0)

    def problem(self) -> str | None:
        """Why this replica does not serve, if so."""
        if self._state != "ready":
            return f"{self._state}: {self._message}"
        if self._looking is not None and not self._looking.done():
            return "Triton does not answer"
        return self._publisher.connection.problem or self._requests.connection.problem

    def start(self) -> None:
        """Begin to live."""
        self._phases.record("launch", time.time() - self._assignment.launched_at)
        self._heartbeat.start()
        self._publisher.connection.start()
        self._task = asyncio.create_task(self._live(), name="life")

    async def drain(self) -> None:
        """Take no more work, finish what is in hand (up to the Deployment's limit), sign off.

        If Triton crashes, or just has, it is started again for what is in hand.
        """
        self._draining = True
        if self._scheduler is not None and not self.failed:
            self._say("draining", "asked to stop")
            await self._heartbeat.beat()
            await self._close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._deployment.drain_limit_s):
                    while (self._unsettled or self._scheduler.in_hand) and not self.ended.is_set():
                        await asyncio.sleep(0.005)
        self.ended.set()

    async def stop(self) -> None:
        """End everything; Triton goes last of all that works."""
        await tasks.end(self._task, self._looking)
        await self._watch.stop()
        await self._gpus.stop()
        if self._scheduler is not None:
            await self._scheduler.stop()
        if self._leases is not None:
            await self._leases.stop()
        if self._messages is not None:
            await self._messages.stop()
        await self._requests.stop()
        await self._publisher.connection.stop()
        self._blobs.close()
        await self._model_report.stop()
        if self._regions is not None:
            await self._regions.close()
        if self._client is not None:
            await self._client.close()
        if self._triton is not None:
            await self._triton.stop()
        await self._heartbeat.stop(forget=not self.failed)

    async def _live(self) -> None:
        try:
            install = await self._find_triton()
            async with asyncio.timeout(self._deployment.start_timeout_s):
                models = await self._prepare(install)
                self._client = await self._start_triton(models)
            await self._serve(self._model(self._client, models[-1]))
            await self._open()
            await self._heartbeat.beat()
            await self._mend(models)
        except TimeoutError:
            await self._fail(
                f"not ready within {self._deployment.start_timeout_s:g} s; its last step: {self._message}"
            )
        except TidegateError as error:
            await self._fail(error.message)
        except Exception as error:
            log.exception("unexpected end")
            await self._fail(f"unexpected error: {error!r}")

    @property
    def _unsettled(self) -> int:
        return self._requests.unsettled + (self._messages.unsettled if self._messages else 0)

    def _say(self, state: ReplicaState, message: str = "") -> None:
        """What it is, for all to read; while it drains it is nothing else, until it fails."""
        self._state, self._message = "draining" if self._draining else state, message
        if state == "ready":
            self._ready_at = self._ready_at or time.time()

    async def _open(self) -> None:
        """Take requests and jobs from now on, unless it drains."""
        if self._draining:
            return
        await self._requests.open()
        if self._messages is not None and not self._draining:  # it may have been told so meanwhile
            await self._messages.open()

    async def _close(self) -> None:
        """Take no more of either."""
        await self._requests.close()
        if self._messages is not None:
            await self._messages.close()

    async def _fail(self, message: str) -> None:
        shown = told(message)
        self._state, self._message, self.failed = "failed", shown.message, True
        more = {"traceback": shown.traceback} if shown.traceback else {}
        log.error("replica failed", extra={"problem": shown.message} | more)
        await self._heartbeat.beat()
        self.ended.set()

    async def _find_triton(self) -> TritonInstall:
        """The Triton of this machine, with an environment of the version's own where it brings requirements.

        What that takes does not count as a part of the start: the first time on a host it takes downloads.
        """
        install = TritonInstall.find(
            self._settings.runtime_path, self._settings.triton_server, self._settings.triton_backends
        )
        requirements = self._assignment.version.requirements
        if not requirements:
            return install
        folder = self._settings.state_path / "cache" / "envs"
        environments = Environments(folder, install, self._tell, self._sandbox)
        with self._phases.measure("environment"):
            return await environments.provide(
                requirements, self._deployment.env, self._settings.environment_timeout_s
            )

    def _tell(self, message: str) -> None:
        self._message = message

    async def _prepare(self, install: TritonInstall) -> list[str]:
        """The artifact on disk and checked, the model repository written: the models to load, in order."""
        version = self._assignment.version
        self._message = "fetching the artifact"
        with self._phases.measure("fetch"):
            cache = ArtifactCache(self._settings.state_path / "cache")
            artifact = await cache.fetch(
                self._settings.registry_url,
                self._token,
                version.artifact_sha256,
                version.artifact_size,
            )
        repository = repository_in(self._folder)
        write = partial(
            model_repository.prepare,
            version,
            self._deployment,
            artifact,
            repository,
            install,
            symlinks=not self._sandbox.mounts,
        )
        self._loading = ModelLoader(self._deployment, write)
        models = await self._loading.prepare()
        options = TritonOptions(
            replica=self._assignment.replica,
            threads=self._deployment.threads,
            env=self._deployment.env,
            auto_complete=not config_is_complete(version),
            start_timeout_s=self._deployment.start_timeout_s,
            response_cache_mb=model_repository.cache_mb(repository, models, self._deployment, install),
            log_bytes_per_s=self._settings.model_log_bytes_per_s,
        )
        if self._triton is None or not self._triton.serves(install, options):
            if self._triton is not None:
                await self._triton.stop(grace_s=0)
            self._triton = new_triton(install, self._folder, options, self._sandbox)
        return models

    async def _start_triton(self, models: list[str]) -> TritonClient:
        """Triton up, the models loaded and warm: a client that speaks to it."""
        assert self._triton is not None
        assert self._loading is not None
        self._message = "starting Triton"
        with self._phases.measure("triton_start"):
            if not self._triton.running:
                await self._triton.start()
        client = TritonClient(self._triton.target, self._triton.http)
        if self._settings.shared_memory_above_bytes:
            triton = self._triton
            self._regions = Regions(client, triton.region, triton.shared_memory, self._sandbox.user)
        self._message = "loading the model"
        with self._phases.measure("load"):
            await self._loading.load(client, models, self._triton.tail)
            found = await client.signature(models[-1])
            if self._signature is None:
                self._signature = found
            # Whatever was registered: Triton knows how many answers its model gives.
            self._signature = self._signature.model_copy(update={"decoupled": found.decoupled})
            self._instances = await client.instances(models[-1])
        self._message = "warming up"
        with self._phases.measure("warm_up"):
            await warm_up(client, models[-1], self._signature, max_batch=self._max_rows() or None)
        await self._model_report.use(client, models[-1], self._triton.repository / models[-1])
        return client

    def _max_rows(self) -> int:
        """Rows of one model call: the Deployment's choice within what the model takes; 0: no batch axis."""
        assert self._signature is not None
        model = self._signature.max_batch_size
        limits = (model, self._deployment.batching.max_batch, self._deployment.max_concurrency)
        return min(limit for limit in limits if limit is not None)

    def _parallel(self) -> float:
        """Requests that the model works on at once, all of its instances together."""
        if self._scheduler is None:
            return 1.0
        stats = self._scheduler.stats
        return effective_concurrency(
            instances=self._instances,
            batch=self._max_rows(),
            call_rows=stats.rows.value,
            call_requests=stats.batch.value,
            open_calls=stats.open_calls.value,
            max_concurrency=self._deployment.max_concurrency,
        )

    def _model(self, client: TritonClient, name: str) -> Model:
        assert self._signature is not None
        self._output_check = OutputCheck(self._signature)
        return Model(
            client,
            name,
            self._signature.outputs,
            self._regions,
            self._settings.shared_memory_above_bytes,
            self._signature.decoupled,
            self._triton is not None and self._triton.caches,
            self._output_check,
        )

    def _streams(self) -> int:
        """How many streams a decoupled model has at once; 0: it is not decoupled."""
        assert self._signature is not None
        return self._deployment.max_concurrency or STREAMS if self._signature.decoupled else 0

    async def _serve(self, model: Model) -> None:
        jobs = self._with_jobs()
        self._scheduler = BatchScheduler(
            self._publisher,
            self._requests.settle,
            self._requests.answer,
            max_rows=self._max_rows(),
            window_s=self._deployment.batching.window_ms / 1e3,
            instances=self._instances,
            on_lost=self._lost,
            max_concurrency=self._deployment.max_concurrency,
            streams=self._streams(),
            jobs=jobs,
        )
        self._model_report.tally = self._scheduler.stats.tally
        self._gpus.start()
        self._requests.feed(self._scheduler)
        self._use(model)
        self._scheduler.start()
        self._requests.start()
        assert self._messages is not None
        self._messages.start(self._scheduler)
        self._message = "waiting for RabbitMQ"
        for connection in (self._publisher.connection, self._requests.connection):
            await connection.wait_up(self._deployment.start_timeout_s)
        self._say("ready", self._loading.caveat if self._loading else "")
        log.info("ready", extra={"phases_ms": self._phases.ms})

    def _with_jobs(self) -> JobScheduler:
        """What runs jobs, and its door. Nobody waits for either: requests are served without them."""
        results = JobResults(self._job_store, self._claims, keep_s=self._settings.job_retention_s)
        replica = self._assignment.replica
        jobs = JobScheduler(self._job_store, results, replica, max_rows=self._max_rows())
        messages = JobConsumer(self._settings.amqp_url, self._deployment.name, self._publisher, jobs)
        self._messages = messages
        jobs.come_from(messages)
        self._leases = JobLeases(
            self._job_store, jobs, messages, replica, ack_timeout_s=self._settings.ack_timeout_s
        )
        self._leases.start()
        return jobs

    def _lost(self, model: Model) -> None:
        """A call found Triton gone; the kernel may say so only later, and it may be there all the same."""
        if self._client is not None:
            self._looking = asyncio.create_task(self._look_again(model, self._client))

    async def _look_again(self, model: Model, client: TritonClient) -> None:
        """Use the model again if only the connection broke; where Triton ended ``_mend`` has the word."""
        assert self._scheduler is not None
        if await self._watch.answers_again(client, lambda: client is self._client):
            self._scheduler.use(model)

    def _died(self, death: Death) -> None:
        """A process of the model has ended; Triton is killed now, so that ``_mend`` starts another."""
        assert self._scheduler is not None
        self._publisher.loss = death.words
        self._scheduler.lose()
        self._say("starting", f"{death.words}; starting it again")

    async def _mend(self, models: list[str]) -> None:
        """Wait for Triton to end, start it again, go on; deaths in a row wait longer and longer."""
        assert self._triton is not None
        assert self._scheduler is not None
        while True:
            code = await self._triton.wait()
            self._scheduler.lose()
            pause_s = self._watch.mourn(code, excused=self._scheduler.suspect_died)
            assert self._watch.last is not None
            TRITON_RESTARTS.inc()
            self._publisher.loss = self._watch.last.words
            self._model_report.rest()
            self._say("starting", f"{self._watch.last.words}; starting it again")
            await asyncio.gather(self._heartbeat.beat(), self._close())
            self._requests.hand_back()
            await self._triton.stop(grace_s=0)
            if self._regions is not None:
                await self._regions.close()
            if self._client is not None:
                client, self._client = self._client, None
                await client.close()
            await self._rest(pause_s)
            async with asyncio.timeout(self._deployment.start_timeout_s):
                self._client = await self._start_triton(models)
            self._use(self._model(self._client, models[-1]))
            self._say("ready", self._loading.caveat if self._loading else "")
            await self._open()
            self._publisher.suspected.set()  # those that it has published itself are run at once
            await self._heartbeat.beat()

    async def _rest(self, pause_s: float) -> None:
        """Wait before the next start, but not with requests in hand that only this worker can finish."""
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not self._draining:
            await asyncio.sleep(min(0.05, pause_s))

    def _use(self, model: Model) -> None:
        """Call a model that was just loaded, and watch its processes."""
        assert self._triton is not None
        assert self._scheduler is not None
        self._watch.begin(self._triton, model)
        self._scheduler.use(model)

    def _contradiction(self) -> str:
        """Return what of the model's answers contradicts its signature, if any does."""
        return self._output_check.told if self._output_check is not None else ""

    def _report(self) -> ReplicaReport:
        stats = self._scheduler.stats if self._scheduler else None
        return ReplicaReport(
            replica=self._assignment.replica,
            deployment=self._deployment.name,
            generation=self._assignment.generation,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self._state,
            message=self._message or self._contradiction(),
            phases_ms=dict(self._phases.ms),
            inflight=self._scheduler.in_hand if self._scheduler else 0,
            completed=stats.completed if stats else 0,
            failed=stats.failed if stats else 0,
            busy_ms=stats.busy_s * 1e3 if stats else 0.0,
            call_ms=stats.call_ms.value if stats else None,
            batch_mean=stats.batch.value if stats else None,
            parallel=self._parallel(),
            metrics_port=self._http_port,
            started_at=self._started_at,
            signature=self._signature.model_dump() if self._signature else None,
            jobs=self._messages.unsettled if self._messages else 0,
            gpu_utilization=self._gpus.utilization,
            gpu_memory_bytes=self._gpus.memory_bytes,
            device=self._loading.device if self._loading else "",
            sandbox=self._sandbox.degree,
            memory_limit=self._triton.memory_limit if self._triton else "",
            ready_at=self._ready_at,
            death=self._watch.last,
        )

"""Runs the Triton of a replica: start, load, warm up, watch, and restart with backoff."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from services.worker.adapters.metrics import TRITON_RESTARTS
from services.worker.adapters.model import Model
from services.worker.adapters.model_report import ModelReport
from services.worker.adapters.sandbox import Sandbox
from services.worker.adapters.shared_memory import Regions
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_process import TritonProcess, new_triton
from services.worker.adapters.warmup import warm_up
from services.worker.application.model_watchdog import ModelWatchdog
from services.worker.application.preparation import PreparedModel
from services.worker.domain.concurrency import CallLimits, call_limits
from services.worker.domain.deaths import Death
from services.worker.domain.output_check import OutputCheck
from services.worker.domain.phases import Phases
from tidegate.kernel import tasks
from tidegate.kernel.protocol.models import Deployment, SequenceSpec, Signature
from tidegate.kernel.protocol.presence import ModelDeath

BACKOFF_POLL_S = 0.05


class TritonSupervisor:
    """Runs the Triton that has the replica's model, and can start it again when it has ended.

    ``on_step`` is called with a text for each step of a start. If a process of the model dies or hangs,
    ``on_death`` is called just before Triton is ended. ``caller_timeouts_s`` returns one number of seconds
    for each open call: the longest timeout of its callers.

    ``triton``: a Triton that runs already; None if there is none. If its options do not suit the model, it is
    stopped before another Triton starts.
    """

    def __init__(
        self,
        deployment: Deployment,
        folder: Path,
        sandbox: Sandbox,
        report: ModelReport,
        phases: Phases,
        *,
        signature: Signature | None,
        shared_memory_above_bytes: int,
        on_step: Callable[[str], None],
        on_death: Callable[[Death], None],
        caller_timeouts_s: Callable[[], Sequence[float]],
        triton: TritonProcess | None = None,
    ) -> None:
        self._deployment = deployment
        self._folder = folder
        self._sandbox = sandbox
        self._report = report
        self._phases = phases
        self._shared_above = shared_memory_above_bytes
        self._on_step = on_step
        self._triton = triton
        self._prepared: PreparedModel | None = None
        self._client: TritonClient | None = None
        self._regions: Regions | None = None
        self._output_check: OutputCheck | None = None
        self._precision = ""
        self._probe: asyncio.Task[None] | None = None
        self._watchdog = ModelWatchdog(deployment.progress_timeout_s, on_death, caller_timeouts_s)
        self.signature = signature
        self.instances = deployment.instances

    @property
    def limits(self) -> CallLimits:
        """Return the limits that the loaded model and its Deployment set for calls."""
        assert self.signature is not None
        return call_limits(self._deployment, self.signature, self.instances)

    @property
    def probing(self) -> bool:
        """Return True while a probe checks if Triton still answers after a lost call."""
        return self._probe is not None and not self._probe.done()

    @property
    def metrics_port(self) -> int:
        """Return the port of Triton's metrics; 0 before its start."""
        return self._triton.metrics_port if self._triton else 0

    @property
    def memory_limit(self) -> str:
        """Return Triton's memory limit and how it is enforced, as one text; empty if there is no limit."""
        return self._triton.memory_limit if self._triton else ""

    @property
    def device(self) -> str:
        """Return the devices on which the models run, as text; empty until the models are loaded."""
        return self._prepared.loader.device if self._prepared else ""

    @property
    def caveat(self) -> str:
        """Return what users should know about how the models run; empty if there is nothing.

        The text says why the models do not run on their GPU. For a quantized model, it also gives the loss of
        precision and the time per call on this CPU. Both are measured with the samples in the model's file.
        Without samples, both are missing.
        """
        loader = self._prepared.loader.caveat if self._prepared else ""
        return "; ".join(filter(None, (loader, self._precision)))

    @property
    def contradiction(self) -> str:
        """Return a text about answers that contradict the model's signature; empty without such answers."""
        return self._output_check.summary if self._output_check is not None else ""

    @property
    def last_death(self) -> ModelDeath | None:
        """Return the last death of Triton or of a process of the model; None if there was none."""
        return self._watchdog.last

    async def configure(self, prepared: PreparedModel) -> None:
        """Use the running Triton if its options suit the model. Otherwise stop it and create a new one."""
        self._prepared = prepared
        if self._triton is None or not self._triton.is_like(prepared.install, prepared.options):
            if self._triton is not None:
                await self._triton.stop(grace_s=0)
            self._triton = new_triton(prepared.install, self._folder, prepared.options, self._sandbox)

    async def start(self) -> Model:
        """Load the models and make the warm-up calls. Return the model to call.

        If Triton does not run yet, start it first. Raises Unavailable if Triton does not start, or ends.
        Raises ModelFailed if a model cannot be loaded, or if an answer in the warm-up contradicts the
        signature.
        """
        assert self._triton is not None
        assert self._prepared is not None
        triton, models = self._triton, self._prepared.models
        self._on_step("starting Triton")
        with self._phases.measure("triton_start"):
            if not triton.running:
                await triton.start()
        client = TritonClient(triton.target, triton.http)
        if self._shared_above:
            self._regions = Regions(client, triton.region, triton.shared_memory, self._sandbox.user)
        self._on_step("loading the model")
        with self._phases.measure("load"):
            await self._prepared.loader.load(client, models, triton.tail)
            signature = await self._read_signature(client, models)
            self.instances = await client.instances(models[-1])
        self._on_step("warming up")
        with self._phases.measure("warm_up"):
            if self._deployment.upstream is None:  # an upstream needs no warm-up, and a call may cost money
                await warm_up(client, models[-1], signature, max_batch=self.limits.max_rows or None)
            if self._prepared.embedded is not None:
                from services.worker.adapters.precision_check import measured_here  # slow: it imports numpy

                self._precision = await measured_here(client, models[-1], self._prepared.embedded)
        await self._report.use(client, models[-1], triton.repository / models[-1])
        self._client = client
        self._output_check = OutputCheck(signature)
        return Model(
            client,
            models[-1],
            signature.outputs,
            self._regions,
            self._shared_above,
            signature.decoupled,
            triton.has_response_cache,
            self._output_check,
        )

    async def _read_signature(self, client: TritonClient, models: Sequence[str]) -> Signature:
        """Return the registered signature, or Triton's signature if none is registered.

        The fields ``decoupled`` and ``sequences`` always come from Triton.
        """
        loaded = await client.signature(models[-1])
        registered = self.signature or loaded
        sequences = await client.sequences(models)
        self.signature = registered.model_copy(update={"decoupled": loaded.decoupled, "sequences": sequences})
        return self.signature

    @property
    def sequences(self) -> SequenceSpec | None:
        """Return the settings of the loaded model's sequences; None if the model keeps no state."""
        return self.signature.sequences if self.signature is not None else None

    def watch(self, model: Model) -> None:
        """Watch the processes of a model that was just started."""
        assert self._triton is not None
        self._watchdog.start(self._triton, model)

    def probe(self, model: Model, resume: Callable[[Model], None]) -> None:
        """Check in the background if Triton still answers after a lost call.

        If Triton answers, only a connection broke, and ``resume`` is called with the model. If Triton does
        not answer, it is ended.
        """
        if self._client is not None:
            self._probe = asyncio.create_task(self._probe_triton(model, self._client, resume))

    async def _probe_triton(
        self, model: Model, client: TritonClient, resume: Callable[[Model], None]
    ) -> None:
        if await self._watchdog.answers_again(client, lambda: client is self._client):
            resume(model)

    async def wait(self) -> int:
        """Wait until Triton has ended. Return its exit code; -N if signal N killed it."""
        assert self._triton is not None
        return await self._triton.wait()

    def record_death(self, code: int, *, excused: bool) -> tuple[ModelDeath, float]:
        """Record that Triton ended. Return the death, and the seconds to wait before the next start.

        ``excused``: True if a suspect ran alone in Triton. Then the suspect caused the death, and the next
        start is not delayed.
        """
        pause_s = self._watchdog.record_death(code, excused=excused)
        TRITON_RESTARTS.inc()
        self._report.rest()
        assert self._watchdog.last is not None
        return self._watchdog.last, pause_s

    async def restart(self, pause_s: float, hurry: Callable[[], bool]) -> Model:
        """Clean up after a Triton that ended, wait ``pause_s`` seconds, and start Triton again.

        Return the model to call. The wait ends early if ``hurry`` returns True. Raises TimeoutError if the
        start takes longer than the Deployment's ``start_timeout_s``. Raises also the errors of :meth:`start`.
        """
        assert self._triton is not None
        await self._triton.stop(grace_s=0)
        await self._close_client()
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not hurry():
            await asyncio.sleep(min(BACKOFF_POLL_S, pause_s))
        async with asyncio.timeout(self._deployment.start_timeout_s):
            return await self.start()

    async def stop_watching(self) -> None:
        """Stop the watchdog and the probe.

        The calling code must do this before it ends the calls of the model.
        """
        await tasks.end(self._probe)
        await self._watchdog.stop()

    async def stop(self) -> None:
        """Close the client and stop Triton."""
        await self._close_client()
        if self._triton is not None:
            await self._triton.stop()

    async def _close_client(self) -> None:
        if self._regions is not None:
            await self._regions.close()
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()

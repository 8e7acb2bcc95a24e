"""Watch a replica's model: end its server if a process ends or is paused, or if the model hangs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from services.worker.adapters.metrics import MODEL_DEATHS
from services.worker.adapters.model import Model
from services.worker.adapters.model_processes import ModelProcesses
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_process import TritonProcess
from services.worker.domain.deaths import MODEL, SERVER, Death
from services.worker.domain.restart_backoff import DeathStreak, after_death
from services.worker.domain.silence import Silence, silence_limit
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.presence import ModelDeath

log = telemetry.logger(__name__)

CHECK_S = 0.25
PROBE_S = 0.1
# If Triton does not answer within this many seconds after a lost call, it is killed and started again.
LOST_LIMIT_S = 5.0


class ModelWatchdog:
    """Ends the model server if a process of its model ends or is paused, or if the model hangs.

    A process is paused if a signal such as SIGSTOP has stopped it. ``on_death`` is called just before the
    model server is ended. ``caller_timeouts_s`` returns one number of seconds for each open call: the longest
    timeout of its callers. ``last`` is the last death, for the replica's report.
    """

    def __init__(
        self,
        progress_timeout_s: float | None,
        on_death: Callable[[Death], None],
        caller_timeouts_s: Callable[[], Sequence[float]] = list,
    ) -> None:
        self._progress_timeout_s = progress_timeout_s
        self._caller_timeouts_s = caller_timeouts_s
        self._on_death = on_death
        self._triton: TritonProcess | None = None
        self._model: Model | None = None
        self._processes: ModelProcesses | None = None
        self._task: asyncio.Task[None] | None = None
        self._death: Death | None = None
        self._streak = DeathStreak()
        self._began = 0.0
        self._silence = Silence(0.0)
        self._total = 0
        self.last: ModelDeath | None = None

    def start(self, triton: TritonProcess, model: Model) -> None:
        """Watch a model that was just loaded into ``triton``."""
        self.end()
        self._triton, self._model, self._death = triton, model, None
        self._began = time.monotonic()
        self._silence = Silence(self._began)
        self._processes = ModelProcesses(triton.pid, triton.descendants(), self._on_end)
        self._task = asyncio.create_task(self._run(), name="model watch")

    def end(self) -> None:
        """Stop watching. After this, an ended process is not recorded as a death."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    async def stop(self) -> None:
        """Stop watching, and wait for the task to end."""
        task = self._task
        self.end()
        await tasks.end(task)

    def check(self) -> None:
        """Check once if a process is paused or the model hangs. If so, end the model server.

        Regular checks are needed, because a paused process or a model that hangs causes no event.
        """
        if self._processes is None or self._model is None or self._death is not None:
            return
        if self._processes.look():
            self._declare_dead(ended_for="a signal (SIGSTOP) had stopped the process")
            return
        silence = self._silence
        silence.check(time.monotonic(), self._model.answers, self._caller_timeouts_s())
        limit = silence_limit(self._progress_timeout_s, silence.timeout_s)
        if silence.lasts_s > limit:
            self._declare_dead(ended_for=f"no call was answered for {limit:g} s")

    def kill(self, reason: str) -> None:
        """End the model server. Record ``reason``, unless a check finds a more exact reason."""
        self.check()
        if self._death is None:
            self._declare_dead(ended_for=reason)

    async def answers_again(self, client: TritonClient, current: Callable[[], bool]) -> bool:
        """Return True if the model server still answers after a lost call.

        If it does not answer, kill it if it still runs, and return False. ``current`` returns True while
        ``client`` is the client of the current model server.
        """
        assert self._triton is not None
        if client.model_died:
            self.kill("Triton reports that the process is not healthy")
            return False
        until = time.monotonic() + LOST_LIMIT_S
        while current() and self._triton.running and time.monotonic() < until:
            await asyncio.sleep(PROBE_S)
            if current() and await client.live():
                return current() and self._triton.running
        if current() and self._triton.running:
            self.kill(f"Triton did not answer for {LOST_LIMIT_S:g} s")
        return False

    def record_death(self, code: int, *, excused: bool = False) -> float:
        """Record the end of a model server. Return the seconds to wait before the next start.

        ``code``: the exit code. ``excused``: True if a suspect ran alone in the server. Then the suspect is
        to blame, not the model.
        """
        assert self._triton is not None
        self.end()
        death = self._death or Death(SERVER, time.time(), code, self._triton.ran_out_of_memory)
        self._streak = after_death(self._streak, time.monotonic() - self._began, excused=excused)
        self._total += 1
        MODEL_DEATHS.inc()
        self.last = ModelDeath(
            at=death.at,
            words=death.description,
            status=death.status,
            in_a_row=self._streak.deaths,
            total=self._total,
            next_start_at=time.time() + self._streak.pause_s,
        )
        log.error(
            death.description,
            extra={
                "in_a_row": self._streak.deaths,
                "pause_s": self._streak.pause_s,
                "tail": self._triton.tail(),
            },
        )
        return self._streak.pause_s

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self.check()

    def _on_end(self, status: int | None) -> None:
        # When Triton has ended, its models' processes end too. Then only Triton's own end is recorded as a
        # death.
        if self._triton is not None and self._triton.running:
            self._declare_dead(status=status)

    def _declare_dead(self, *, status: int | None = None, ended_for: str = "") -> None:
        assert self._triton is not None
        if self._death is not None:
            return
        self._death = Death(
            MODEL, time.time(), status, self._triton.ran_out_of_memory and not ended_for, ended_for
        )
        self._on_death(self._death)
        self._triton.kill()

"""Watch the processes of a replica's model: one that ends, is stopped or owes an answer for too long."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from services.worker.adapters.metrics import MODEL_DEATHS
from services.worker.adapters.model import Model
from services.worker.adapters.model_processes import ModelProcesses
from services.worker.adapters.triton_client import TritonClient
from services.worker.adapters.triton_process import TritonProcess
from services.worker.domain.deaths import (
    MODEL,
    SERVER,
    Death,
    DeathStreak,
    Silence,
    after_death,
    silence_limit,
)
from tidegate.kernel import tasks, telemetry
from tidegate.kernel.protocol.presence import ModelDeath

log = telemetry.logger(__name__)

LOOK_S = 0.25
LOOK_AGAIN_S = 0.1
# A Triton that runs and does not answer for so long is started anew; one that ends takes less than a second.
LOST_LIMIT_S = 5.0


class ModelWatchdog:
    """End the model server as soon as one of its model's processes has ended, is stopped or hangs.

    ``on_death`` is called then, before any call has failed. ``waiting`` returns for each open call how long
    its callers wait, in seconds. ``last`` is the last death, as it is reported.
    """

    def __init__(
        self,
        progress_timeout_s: float | None,
        on_death: Callable[[Death], None],
        waiting: Callable[[], Sequence[float]] = list,
    ) -> None:
        self._progress_timeout_s = progress_timeout_s
        self._waiting = waiting
        self._on_death = on_death
        self._triton: TritonProcess | None = None
        self._model: Model | None = None
        self._processes: ModelProcesses | None = None
        self._task: asyncio.Task[None] | None = None
        self._death: Death | None = None
        self._row = DeathStreak()
        self._began = 0.0
        self._silence = Silence(0.0)
        self._total = 0
        self.last: ModelDeath | None = None

    def begin(self, triton: TritonProcess, model: Model) -> None:
        """Watch the processes of a model that was just loaded."""
        self.end()
        self._triton, self._model, self._death = triton, model, None
        self._began = time.monotonic()
        self._silence = Silence(self._began)
        self._processes = ModelProcesses(triton.pid, triton.descendants(), self._on_end)
        self._task = asyncio.create_task(self._run(), name="model watch")

    def end(self) -> None:
        """Watch no more; what ends from now on is meant to."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._processes is not None:
            self._processes.close()
            self._processes = None

    async def stop(self) -> None:
        """End, and wait for it."""
        task = self._task
        self.end()
        await tasks.end(task)

    def look(self) -> None:
        """Look once at everything that no event tells."""
        if self._processes is None or self._model is None or self._death is not None:
            return
        if self._processes.look():
            self._die(ended_for="it was stopped by a signal (SIGSTOP)")
            return
        silence = self._silence
        silence.look(time.monotonic(), self._model.answers, self._waiting())
        limit = silence_limit(self._progress_timeout_s, silence.patience_s)
        if silence.lasts_s > limit:
            self._die(ended_for=f"it answered no call for {limit:g} s")

    def blame(self, why: str) -> None:
        """End the model server, unless a process has ended by itself, for which this is the reason."""
        self.look()
        if self._death is None:
            self._die(ended_for=why)

    async def answers_again(self, client: TritonClient, current: Callable[[], bool]) -> bool:
        """Return True if the model server of a call that was lost answers; else it has ended, or is ended.

        ``current``: the client is that of the model server which runs.
        """
        assert self._triton is not None
        if client.model_died:
            self.blame("Triton says that it is not healthy")
            return False
        until = time.monotonic() + LOST_LIMIT_S
        while current() and self._triton.running and time.monotonic() < until:
            await asyncio.sleep(LOOK_AGAIN_S)
            if current() and await client.live():
                return current() and self._triton.running
        if current() and self._triton.running:
            self.blame(f"Triton did not answer for {LOST_LIMIT_S:g} s")
        return False

    def mourn(self, code: int, *, excused: bool = False) -> float:
        """Note the death of a model server with this exit code; return how long its next start waits.

        ``excused``: a request that was lost before ran alone in it.
        """
        assert self._triton is not None
        self.end()
        death = self._death or Death(SERVER, time.time(), code, self._triton.starved)
        self._row = after_death(self._row, time.monotonic() - self._began, excused=excused)
        self._total += 1
        MODEL_DEATHS.inc()
        self.last = ModelDeath(
            at=death.at,
            words=death.words,
            status=death.status,
            in_a_row=self._row.deaths,
            total=self._total,
            next_start_at=time.time() + self._row.pause_s,
        )
        log.error(
            death.words,
            extra={"in_a_row": self._row.deaths, "pause_s": self._row.pause_s, "tail": self._triton.tail()},
        )
        return self._row.pause_s

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def _on_end(self, status: int | None) -> None:
        # Of a server that is killed its models' processes end as well: that is one death.
        if self._triton is not None and self._triton.running:
            self._die(status=status)

    def _die(self, *, status: int | None = None, ended_for: str = "") -> None:
        assert self._triton is not None
        if self._death is not None:
            return
        self._death = Death(MODEL, time.time(), status, self._triton.starved and not ended_for, ended_for)
        self._on_death(self._death)
        self._triton.kill()

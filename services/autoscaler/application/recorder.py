"""Record the rounds of the control loop and the arrivals of requests.

A thread writes the recordings, so the control loop does not wait for the disk.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

from services.autoscaler.adapters.history.recordings import Recordings
from services.autoscaler.domain.cold_start import start_time
from services.autoscaler.domain.forecast import MINUTE_S, SEASON_MINUTES, SEASONS_USED, expected
from services.autoscaler.domain.memory import State
from services.autoscaler.domain.recording import LastRound, RecordedRound, write_chunk, write_round
from services.autoscaler.domain.snapshot import Plan, Policy, Snapshot
from tidegate.kernel import telemetry
from tidegate.kernel.errors import Unavailable
from tidegate.kernel.protocol.models import Deployment

log = telemetry.logger(__name__)

CHUNK_S = 20.0
WHOLE_EVERY_S = 300.0
ARRIVALS_EVERY_S = 15.0
RETIRE_EVERY_S = 600.0


class Recorder:
    """The leader's recorder of rounds and arrivals. A crash may lose the last seconds of the recordings."""

    def __init__(self, recordings: Recordings, policy: Policy, *, observations: bool) -> None:
        self._recordings = recordings
        self._policy = policy
        self._observations = observations
        self._last = LastRound()
        self._rounds: list[RecordedRound] = []
        self._before: State | None = None
        self._whole_at = float("-inf")
        self._arrivals: Counter[tuple[str, int]] = Counter()
        self._arrivals_at = self._retired_at = self._expected_at = 0.0
        self._writing: asyncio.Task[None] | None = None
        # Only one write runs at a time, because each write depends on the previous one. It adds to the
        # arrival counts on disk, and its chunk of rounds continues the previous chunk.
        self._turn = asyncio.Lock()
        self._expected: dict[str, float] = {}
        self._forecast_for: set[str] = set()

    def note(self, before: State, snapshot: Snapshot, plan: Plan, after: State, now: float) -> None:
        """Record one round. ``before`` and ``after`` are the states before and after the round."""
        for name, memory in after.deployments.items():
            if memory.seen is not None and memory.seen.new:
                self._arrivals[name, int(now)] += memory.seen.new
        if self._observations and snapshot.desired_state is not None:
            if not self._rounds:
                self._before = None
                if now - self._whole_at >= WHOLE_EVERY_S:
                    self._before, self._last, self._whole_at = before, LastRound(), now
            self._rounds.append(RecordedRound(now, write_round(snapshot, self._last), plan.decisions))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write(now, whole=False))

    async def flush(self, now: float) -> None:
        """Write all recorded rounds and arrivals to disk."""
        if self._writing is not None:
            await self._writing
        await self._write(now, whole=True)

    async def forecast(self, deployments: list[Deployment], state: State, now: float) -> Mapping[str, float]:
        """Return each Deployment's highest expected arrival rate until a new replica could be ready.

        Rates are in requests a second. Deployments without a forecast or with too little history are left
        out.
        """
        seasonal = [each for each in deployments if each.scaling.forecast != "off"]
        names = {each.name for each in seasonal}
        if now - self._expected_at >= MINUTE_S or names != self._forecast_for:
            self._expected_at, self._forecast_for = now, names
            rates = {each.name: await self._forecast_of(each, state, now) for each in seasonal}
            self._expected = {name: rate for name, rate in rates.items() if rate is not None}
        return self._expected

    async def _forecast_of(self, deployment: Deployment, state: State, now: float) -> float | None:
        season, name = deployment.scaling.forecast, deployment.name
        since = int(now) - (SEASONS_USED[season] + 1) * SEASON_MINUTES[season] * MINUTE_S
        try:
            first = await asyncio.to_thread(self._recordings.first_second, name)
            minutes = await asyncio.to_thread(self._recordings.by_minute, name, since, int(now))
        except Unavailable:
            return None
        if first is None:
            return None
        ahead_s = start_time(state, name) or 0.0
        return expected(minutes, first // MINUTE_S, season, now, ahead_s)

    async def _write(self, now: float, *, whole: bool) -> None:
        async with self._turn:
            await self._write_noted(now, whole=whole)

    async def _write_noted(self, now: float, *, whole: bool) -> None:
        try:
            if self._arrivals and (whole or now - self._arrivals_at >= ARRIVALS_EVERY_S):
                arrivals, self._arrivals, self._arrivals_at = self._arrivals, Counter(), now
                await asyncio.to_thread(self._recordings.add_arrivals, arrivals)
            if self._rounds and (whole or now - self._rounds[0].now >= CHUNK_S):
                rounds, self._rounds = self._rounds, []
                await asyncio.to_thread(self._keep, self._before, rounds)
            if now - self._retired_at >= RETIRE_EVERY_S:
                self._retired_at = now
                await asyncio.to_thread(self._recordings.retire, now)
        except Unavailable as error:
            # Later rounds cannot continue a lost chunk, so the next chunk is self-contained.
            self._whole_at, self._rounds = float("-inf"), []
            log.warning("the recordings were not written", extra={"problem": error.message})

    def _keep(self, before: State | None, rounds: list[RecordedRound]) -> None:
        self._recordings.add_chunk(rounds[0].now, rounds[-1].now, write_chunk(self._policy, before, rounds))

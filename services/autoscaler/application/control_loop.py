"""The control loop: observe, decide, act. Every decision is made in ``domain/``."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from services.autoscaler.adapters import metrics
from services.autoscaler.adapters.history.decision_store import COLD_STARTS_KEPT, DecisionStore
from services.autoscaler.adapters.registry.desired_state import DesiredStateSource
from services.autoscaler.adapters.registry.overrides import Overrides
from services.autoscaler.adapters.registry.replica_grants import ReplicaGrants
from services.autoscaler.application.cost_ledger import CostLedger
from services.autoscaler.application.recorder import Recorder
from services.autoscaler.domain.cold_start import ColdStart, cold_starts, start_times
from services.autoscaler.domain.decide import decide
from services.autoscaler.domain.launcher import Launcher, parse_replica
from services.autoscaler.domain.memory import State
from services.autoscaler.domain.replica_artifacts import artifacts_of
from services.autoscaler.domain.snapshot import (
    Action,
    Decision,
    Drain,
    HostProbe,
    Kill,
    Launch,
    Plan,
    Policy,
    Snapshot,
)
from services.autoscaler.domain.status import statuses
from tidegate.kernel import telemetry
from tidegate.kernel.errors import NotFound, TidegateError, Unavailable
from tidegate.kernel.protocol.deployment_status import DeploymentStatus
from tidegate.kernel.protocol.models import Assignment
from tidegate.kernel.protocol.presence import GatewayView, ReplicaReport
from tidegate.kernel.store import JobStore, Store, StoreUnavailable

log = telemetry.logger(__name__)

# Seconds between rounds while a replica starts and after an action. The time is short, so that the autoscaler
# soon notices a ready replica.
MOVING_PERIOD_S = 0.2
RECENT_DECISIONS = 1000


@dataclass(frozen=True, slots=True)
class LoopParts:
    """The adapters that the control loop uses."""

    launcher: Launcher
    store: Store
    jobs: JobStore
    source: DesiredStateSource
    overrides: Overrides
    decisions: DecisionStore
    recorder: Recorder
    grants: ReplicaGrants
    host_probe: HostProbe
    costs: CostLedger


class ControlLoop:
    """The loop that keeps every Deployment at its target. One task runs it; the API reads its attributes."""

    def __init__(
        self,
        parts: LoopParts,
        policy: Policy,
        period_s: float,
        host: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._parts = parts
        self._policy = policy
        self._period_s = period_s
        self._clock = clock
        self.host = host
        self._wake = asyncio.Event()
        self._hints: dict[str, float] = {}
        self._launch_failures: dict[str, str] = {}
        self._causes: dict[str, str] = {}
        self._acted = False
        self._listed_at = 0.0
        self._cold_starts: dict[str, list[dict[str, Any]]] = {}
        self.state = State()
        self.cordoned: dict[str, float] = {}
        self.snapshot: Snapshot | None = None
        self.statuses: dict[str, DeploymentStatus] = {}
        self.recent: deque[Decision] = deque(maxlen=RECENT_DECISIONS)
        self.problem: str | None = "The first round has not run yet."
        self.store_problem: str | None = None
        self.jobs_problem: str | None = None

    def take_over(self) -> None:
        """Read the state of the former leader. Call this when the process becomes the leader."""
        self._parts.overrides.take_over()
        self._cold_starts = self._parts.decisions.cold_starts()
        self.cordoned = self._parts.decisions.cordons()
        starts = {name: start_times(found) for name, found in self._cold_starts.items()}
        self.state = State(generations=self._parts.decisions.generations(), starts=starts)

    def wake(self) -> None:
        """Start the next round immediately."""
        self._wake.set()

    def hint(self, deployment: str) -> None:
        """Record that a demand event for ``deployment`` has arrived.

        A gateway publishes this event so that a replica starts. For a while, the event counts as one request
        for the Deployment.
        """
        self._hints[deployment] = self._clock()
        self.wake()

    async def run(self) -> None:
        """Run rounds until cancelled. A failed round is logged, and the next round tries again."""
        while True:
            self._wake.clear()
            try:
                with metrics.ROUND_SECONDS.time():
                    await self.round()
                self.problem = None
            except Exception as error:  # an error must not end the loop
                self.problem = f"The last round failed: {error}"
                log.exception("round failed")
            moving = self._acted or any(status.starting for status in self.statuses.values())
            pause = min(self._period_s, MOVING_PERIOD_S) if moving else self._period_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def round(self) -> None:
        """Run one round: observe, decide, publish and act."""
        snapshot = await self.observe()
        now = self._clock()
        self._parts.costs.note(snapshot, self._listed_at)
        if snapshot.running is not None:
            self._parts.grants.running(artifacts_of(snapshot.running, snapshot.desired_state))
        before = self.state
        plan, self.state = decide(snapshot, self._policy, before, now)
        self._launch_failures, self._acted = {}, bool(plan.actions)
        self.snapshot = snapshot
        self._parts.recorder.note(before, snapshot, plan, self.state, now)
        for cold_start in cold_starts(before, self.state, snapshot, self._causes, now):
            await self._note_cold_start(cold_start)
        gone = self.statuses.keys()
        self.statuses = statuses(snapshot, self.state, self.statuses, self._cold_starts, now)
        for name, cost in self._parts.costs.per_hour().items():
            if name in self.statuses and self.statuses[name].cost_per_hour is None:
                self.statuses[name].cost_per_hour = cost
        metrics.show(self.statuses, gone - self.statuses.keys())
        await self._record(plan)
        await asyncio.gather(self._publish(), self.act(plan))

    async def observe(self) -> Snapshot:
        """Return a snapshot. A value that cannot be read is None."""
        if self._parts.source.answered and self._parts.overrides.pending:
            await self._parts.overrides.reconcile()
        self._listed_at = self._clock()
        running, room, (reports, gateways), jobs = await asyncio.gather(
            self._parts.launcher.list(),
            self._parts.host_probe.read(),
            self._live_facts(),
            self._unfinished_jobs(),
        )
        now = self._clock()
        held = self._policy.hint_hold_s
        self._hints = {name: at for name, at in self._hints.items() if now - at < held}
        desired_state = self._parts.source.current
        deployments = desired_state.deployments if desired_state else []
        # A snapshot from a recording has its replicas sorted by name. Sort them here too, so that a replay of
        # the recording makes the same decisions.
        return Snapshot(
            desired_state=desired_state,
            running=tuple(sorted(running, key=lambda each: each.replica)),
            reports=reports,
            gateways=gateways,
            jobs=jobs,
            hints=dict(self._hints),
            overrides=dict(self._parts.overrides.pending),
            launch_failures=dict(self._launch_failures),
            over_budget=self._parts.costs.over_budget,
            expected=await self._parts.recorder.forecast(deployments, self.state, now),
            host=self.host,
            cordoned=frozenset(self.cordoned),
            room=room,
        )

    async def act(self, plan: Plan) -> None:
        """Run the actions of a plan.

        The actions of one Deployment run in order. The actions of different Deployments run concurrently.
        """
        by_deployment: dict[str, list[Action]] = {}
        for action in plan.actions:
            by_deployment.setdefault(deployment_of(action), []).append(action)
        await asyncio.gather(*(self._in_order(actions) for actions in by_deployment.values()))

    async def cordon(self, host: str) -> None:
        """Start no more replicas on a host. A second cordon does not change the time of the first."""
        at = self.cordoned.setdefault(host, self._clock())
        await asyncio.to_thread(self._parts.decisions.cordon, host, at)
        self.wake()

    async def uncordon(self, host: str) -> None:
        """Allow starts on a host again."""
        self.cordoned.pop(host, None)
        await asyncio.to_thread(self._parts.decisions.uncordon, host)
        self.wake()

    async def drain(self, replica: str) -> None:
        """Drain one replica for an operator. The next round replaces it."""
        running = {each.replica: each for each in await self._parts.launcher.list()}
        if replica not in running or not running[replica].alive:
            raise NotFound(f"There is no replica {replica}.")
        await self._parts.launcher.drain(replica)
        name = running[replica].deployment
        memory = self.state.deployments.get(name)
        target = memory.target if memory else 0
        decision = Decision(
            self._clock(), name, "operator", "drain requested", target, target, {}, [f"drain {replica}"]
        )
        await self._record(Plan(decisions=(decision,)))
        self.wake()

    async def _live_facts(self) -> tuple[dict[str, ReplicaReport] | None, GatewayView | None]:
        try:
            reports, gateways = await asyncio.gather(
                self._parts.store.replicas(), self._parts.store.gateways()
            )
        except StoreUnavailable as error:
            self.store_problem = error.message
            return None, None
        self.store_problem = None
        gateways.reports.sort(key=lambda report: report.incarnation)
        reports.sort(key=lambda report: report.replica)
        return {report.replica: report for report in reports}, gateways

    async def _unfinished_jobs(self) -> dict[str, int] | None:
        """Return the number of waiting and running jobs of each Deployment; None if it cannot be read."""
        try:
            counts = await self._parts.jobs.counts()
        except StoreUnavailable as error:
            self.jobs_problem = error.message
            return None
        self.jobs_problem = None
        return {name: load.waiting + load.running for name, load in counts.deployments.items()}

    async def _publish(self) -> None:
        shown = {name: status.model_dump(mode="json") for name, status in self.statuses.items()}
        # If the store does not answer, the next round publishes again.
        with contextlib.suppress(StoreUnavailable):
            await self._parts.store.publish_statuses(shown)

    async def _in_order(self, actions: Iterable[Action]) -> None:
        for action in actions:
            try:
                await self._do(action)
            except TidegateError as error:
                extra = {"replica": action.replica, "problem": error.message}
                log.warning("action failed", extra=extra)
                if isinstance(action, Launch):
                    self._launch_failures[action.replica] = error.message

    async def _do(self, action: Action) -> None:
        match action:
            case Launch():
                await self._launch(action)
            case Drain():
                await self._parts.launcher.drain(action.replica)
            case Kill():
                await self._parts.launcher.kill(action.replica)
                self._parts.costs.killed(action.replica, self._clock())
                self._causes.pop(action.replica, None)
                if action.forget:
                    with contextlib.suppress(StoreUnavailable):
                        await self._parts.store.forget_replica(action.replica)

    async def _launch(self, action: Launch) -> None:
        # A replica's name contains its generation. The generation is stored before the start, so that no name
        # is used twice, even after a crash.
        self._parts.decisions.save_generation(action.deployment.name, action.slot, action.generation)
        self._causes[action.replica] = action.cause
        self._parts.grants.launching(action.replica, action.version.artifact_sha256)
        await self._parts.launcher.launch(
            Assignment(
                replica=action.replica,
                generation=action.generation,
                deployment=action.deployment,
                version=action.version,
                launched_at=self._clock(),
            )
        )

    async def _note_cold_start(self, found: ColdStart) -> None:
        metrics.LAUNCH_SECONDS.labels(found.deployment).observe(found.total_ms / 1000.0)
        log.info("replica is ready", extra={"cold_start": found.view()})
        kept = self._cold_starts.setdefault(found.deployment, [])
        kept.insert(0, found.view())
        del kept[COLD_STARTS_KEPT:]
        await self._keep(lambda: self._parts.decisions.add_cold_start(found.deployment, found.view()))

    async def _record(self, plan: Plan) -> None:
        metrics.count(plan.decisions, ((deployment_of(a), a) for a in plan.actions))
        for decision in plan.decisions:
            self.recent.append(decision)
            extra = {
                "deployment": decision.deployment,
                "rule": decision.rule,
                "reason": decision.reason,
                "target": [decision.before, decision.after],
                "actions": decision.actions,
            }
            log.info("decided", extra=extra)
        if plan.decisions:
            await self._keep(lambda: self._parts.decisions.add_decisions(plan.decisions))

    async def _keep(self, write: Callable[[], None]) -> None:
        """Write to the database. If the write fails, for example on a full disk, the loop continues."""
        try:
            await asyncio.to_thread(write)
        except Unavailable as error:
            log.warning("a decision or a cold start could not be stored", extra={"problem": error.message})


def deployment_of(action: Action) -> str:
    """Return the name of the Deployment that an action belongs to."""
    if isinstance(action, Launch):
        return action.deployment.name
    parsed = parse_replica(action.replica)
    return parsed[0] if parsed else action.replica

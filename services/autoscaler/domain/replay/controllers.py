"""The controllers of a replay: the real ``decide``, or the formula of another autoscaler."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Protocol

from services.autoscaler.domain.cold_start import start_time
from services.autoscaler.domain.decide import decide
from services.autoscaler.domain.forecast import MINUTE_S, expected
from services.autoscaler.domain.launcher import Running, fingerprint, replica_name
from services.autoscaler.domain.llm_load import is_llm
from services.autoscaler.domain.memory import State
from services.autoscaler.domain.replay.fleet import SimulatedFleet, SimulatedReplica
from services.autoscaler.domain.replay.formulas import FleetView, Formula
from services.autoscaler.domain.snapshot import Decision, Drain, Kill, Launch, Policy, Snapshot
from tidegate.kernel.protocol.models import Deployment, DesiredState, Version
from tidegate.kernel.protocol.presence import (
    EngineReport,
    GatewayLoad,
    GatewayReport,
    GatewayView,
    ReplicaReport,
)


class Controller(Protocol):
    """The interface of controllers, which start and drain replicas; ``target`` is the desired number."""

    name: str
    target: int
    decisions: list[Decision]

    def begin(self, fleet: SimulatedFleet, now: float) -> None:
        """Add the minimum number of replicas. They are ready immediately."""

    def round(self, fleet: SimulatedFleet, now: float) -> None:
        """Observe the fleet once, and start or drain replicas."""


@dataclass(slots=True)
class DecideController:
    """A controller that uses the real ``decide``, with a Deployment's own policy or another one."""

    name: str
    deployment: Deployment
    version: Version
    policy: Policy
    target: int = 0
    decisions: list[Decision] = field(default_factory=list)
    history: Counter[int] = field(default_factory=Counter)
    _state: State = field(default_factory=State)
    _arrived: int = 0
    _expected: float | None = None
    _expected_at: float = 0.0

    def begin(self, fleet: SimulatedFleet, now: float) -> None:
        """Add the minimum number of ready replicas, and tell ``decide`` how many seconds a start takes."""
        name, least = self.deployment.name, self.deployment.min_replicas
        generations = {(name, slot): 1 for slot in range(max(1, least))}
        self._state = State(generations=generations, starts={name: (fleet.service.start_s,)})
        for slot in range(least):
            fleet.ready(_running(self.deployment, slot, 1, now), now)

    def round(self, fleet: SimulatedFleet, now: float) -> None:
        """Observe the fleet once, and start or drain replicas."""
        self.history[int(now // MINUTE_S)] += fleet.arrived - self._arrived
        self._arrived = fleet.arrived
        snapshot = self._snapshot(fleet, now)
        plan, self._state = decide(snapshot, self.policy, self._state, now)
        self.target = self._state.deployments[self.deployment.name].target
        self.decisions += plan.decisions
        for action in plan.actions:
            match action:
                case Launch():
                    fleet.launch(_running(self.deployment, action.slot, action.generation, now), now)
                case Drain():
                    fleet.drain(action.replica, now)
                case Kill():
                    fleet.kill(action.replica)

    def _snapshot(self, fleet: SimulatedFleet, now: float) -> Snapshot:
        name = self.deployment.name
        load = GatewayLoad(outstanding=fleet.outstanding(), arrived=fleet.arrived)
        if is_llm(self.version):
            load.waiting = len(fleet.queue)
            load.waiting_tokens = load.waiting * fleet.service.prompt_tokens
        rate = self._forecast(now)
        return Snapshot(
            desired_state=DesiredState(revision=1, versions=[self.version], deployments=[self.deployment]),
            running=tuple(replace(s.running, alive=s.gone_at is None) for s in fleet.servers.values()),
            reports={
                replica: self._report(s, fleet, now)
                for replica, s in fleet.servers.items()
                if s.gone_at is None
            },
            gateways=GatewayView([GatewayReport("replay", now, {name: load})]),
            expected={} if rate is None else {name: rate},
        )

    def _report(self, server: SimulatedReplica, fleet: SimulatedFleet, now: float) -> ReplicaReport:
        report = _report(server, now)
        if is_llm(self.version):
            # A worker reports the busy time as if the requests in all slots shared one call. So divide the
            # busy time by the number of slots.
            report.busy_ms /= fleet.service.slots
            report.batch_mean, report.call_ms = float(fleet.service.slots), None
            report.llm = EngineReport(
                slots=fleet.service.slots,
                running=server.under_way,
                prompt_tokens=(server.completed + server.under_way) * fleet.service.prompt_tokens,
            )
        return report

    def _forecast(self, now: float) -> float | None:
        season = self.deployment.scaling.forecast
        if season != "off" and now - self._expected_at >= MINUTE_S:
            self._expected_at = now
            ahead_s = start_time(self._state, self.deployment.name) or 0.0
            self._expected = expected(self.history, min(self.history), season, now, ahead_s)
        return self._expected


@dataclass(slots=True)
class FormulaController:
    """A controller that uses another autoscaler's formula, within the Deployment's bounds."""

    name: str
    deployment: Deployment
    formula: Formula
    target: int = 0
    decisions: list[Decision] = field(default_factory=list)
    _generation: int = 0

    def begin(self, fleet: SimulatedFleet, now: float) -> None:
        """Add the minimum number of replicas. They are ready immediately."""
        self.target = self.deployment.min_replicas
        for _ in range(self.target):
            fleet.ready(self._next(now), now)

    def round(self, fleet: SimulatedFleet, now: float) -> None:
        """Observe the fleet once, and start or drain replicas."""
        for replica in [name for name, s in fleet.servers.items() if s.gone_at is not None]:
            fleet.kill(replica)
        active = [s for s in fleet.servers.values() if not s.draining]
        ready = sum(s.ready_at <= now for s in active)
        view = FleetView(now, fleet.outstanding(), ready, self.target)
        found = self.formula.desired(view)
        self.target = max(self.deployment.min_replicas, min(self.deployment.max_replicas, found))
        for _ in range(self.target - len(active)):
            fleet.launch(self._next(now), now)
        leave = sorted(active, key=lambda s: (s.ready_at <= now, s.under_way, -s.ready_at))
        for server in leave[: max(0, len(active) - self.target)]:
            fleet.drain(server.running.replica, now)

    def _next(self, now: float) -> Running:
        self._generation += 1
        return _running(self.deployment, 0, self._generation, now)


def _running(deployment: Deployment, slot: int, generation: int, now: float) -> Running:
    return Running(
        replica=replica_name(deployment.name, slot, generation),
        deployment=deployment.name,
        slot=slot,
        generation=generation,
        pid=1,
        alive=True,
        launched_at=now,
        fingerprint=fingerprint(deployment),
        drain_limit_s=1e9,
    )


def _report(server: SimulatedReplica, now: float) -> ReplicaReport:
    calls = server.calls
    return ReplicaReport(
        replica=server.running.replica,
        deployment=server.running.deployment,
        generation=server.running.generation,
        host="replay",
        pid=1,
        state="draining" if server.draining else "ready" if server.ready_at <= now else "starting",
        inflight=server.under_way,
        completed=server.completed,
        busy_ms=server.busy_ms,
        call_ms=server.busy_ms / calls if calls else None,
        batch_mean=server.completed / calls if calls else None,
    )

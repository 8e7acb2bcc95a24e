"""A simulated world of Deployments, workers and gateways, for ``decide`` in simulated time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest

from services.autoscaler.domain.decide import decide
from services.autoscaler.domain.launcher import Running, fingerprint
from services.autoscaler.domain.memory import State
from services.autoscaler.domain.snapshot import (
    Decision,
    Drain,
    Host,
    Kill,
    Launch,
    LocalOverride,
    Plan,
    Policy,
    Snapshot,
)
from services.autoscaler.domain.status import statuses
from tidegate.kernel.protocol.deployment_status import DeploymentStatus
from tidegate.kernel.protocol.models import Deployment, DesiredState, Endpoint, Version, VersionMetadata
from tidegate.kernel.protocol.presence import (
    GatewayLoad,
    GatewayReport,
    GatewayView,
    ModelDeath,
    ReplicaReport,
    ReplicaState,
)

START = 1_700_000_000.0
BORN = datetime(2024, 1, 1, tzinfo=UTC)


def a_version(**metrics: float) -> Version:
    return Version(
        model="digits",
        number=1,
        format="onnx",
        artifact_sha256="0" * 64,
        artifact_size=1,
        filename="model.onnx",
        metadata=VersionMetadata(metrics=metrics),
        created_at=BORN,
    )


def a_deployment(**given) -> Deployment:
    wanted = {"name": "digits-v1", "model": "digits", "version": 1, "revision": 1, "created_at": BORN}
    return Deployment.model_validate({**wanted, **given})


@dataclass
class Worker:
    running: Running
    ready_at: float
    inflight: int = 0
    jobs: int = 0
    completed: int = 0
    busy_ms: float = 0.0
    call_ms: float | None = None
    silent: bool = False
    failed: str = ""
    remark: str = ""
    phases_ms: dict[str, float] = field(default_factory=dict)
    death: ModelDeath | None = None
    sequences: int = 0


class World:
    """A simulated world. ``run`` makes a round every half second and executes its decisions."""

    def __init__(self, *deployments: Deployment, policy: Policy | None = None, start_s: float = 2.0) -> None:
        self.deployments = list(deployments)
        self.endpoints: list[Endpoint] = []
        self.policy = policy or Policy()
        self.start_s = start_s
        self.drain_s = 1.0
        self.now = START
        self.state = State()
        self.workers: dict[str, Worker] = {}
        self.outstanding: dict[str, int] = {}
        self.arrived: dict[str, int] = {}
        self.hints: dict[str, float] = {}
        self.overrides: dict[str, LocalOverride] = {}
        self.over_budget: dict[str, str] = {}
        self.gateway_known = True
        self.store_up = True
        self.jobs: dict[str, int] | None = {}
        self.cordoned: set[str] = set()
        self.room: Host | None = None
        self.desired_state_known = True
        self.fail_load = ""
        self.fail_launch = ""
        self.call_ms: float | None = None
        self.sequence_slots = 0
        self.metrics: dict[str, float] = {}
        self.decisions: list[Decision] = []
        self.rounds: list[tuple[State, Snapshot, Plan, float]] = []
        self.launched: list[tuple[float, str]] = []
        self.killed: list[tuple[float, str, str]] = []
        self.launch_failures: dict[str, str] = {}
        self.statuses: dict[str, DeploymentStatus] = {}

    def run(self, seconds: float, step: float = 0.5) -> None:
        end = self.now + seconds
        while self.now < end:
            self.round()
            self.now += step

    def round(self) -> Plan:
        for name, worker in list(self.workers.items()):
            since = worker.running.draining_since
            if since is not None and worker.running.alive and self.now - since >= self.drain_s:
                self.workers[name].running = replace(worker.running, alive=False)
        snapshot, before = self.snapshot(), self.state
        plan, self.state = decide(snapshot, self.policy, self.state, self.now)
        self.rounds.append((before, snapshot, plan, self.now))
        self.launch_failures = {}
        self.decisions += plan.decisions
        self.statuses = statuses(snapshot, self.state, self.statuses, {}, self.now)
        for action in plan.actions:
            self._do(action)
        return plan

    def snapshot(self) -> Snapshot:
        known = self.store_up
        return Snapshot(
            desired_state=self.desired_state() if self.desired_state_known else None,
            running=tuple(worker.running for _, worker in sorted(self.workers.items())),
            reports={r.replica: r for r in self.reports()} if known else None,
            gateways=self.gateways() if known else None,
            jobs=self.jobs,
            hints=dict(self.hints),
            overrides=dict(self.overrides),
            over_budget=dict(self.over_budget),
            launch_failures=dict(self.launch_failures),
            host="here",
            cordoned=frozenset(self.cordoned),
            room=self.room,
        )

    def desired_state(self) -> DesiredState:
        return DesiredState(
            revision=1,
            versions=[a_version(**self.metrics)],
            deployments=self.deployments,
            endpoints=self.endpoints,
        )

    def reports(self) -> list[ReplicaReport]:
        return [self._report(worker) for _, worker in sorted(self.workers.items()) if not worker.silent]

    def gateways(self) -> GatewayView:
        names = {*self.outstanding, *self.arrived}
        loads = {
            name: GatewayLoad(outstanding=self.outstanding.get(name, 0), arrived=self.arrived.get(name, 0))
            for name in names
        }
        missing = [] if self.gateway_known else ["g2"]
        return GatewayView([GatewayReport("g1", self.now, loads)], missing)

    def names(self, deployment: str = "digits-v1") -> list[str]:
        return sorted(
            name
            for name, worker in self.workers.items()
            if worker.running.deployment == deployment
            and worker.running.alive
            and worker.running.draining_since is None
        )

    def target(self, deployment: str = "digits-v1") -> int:
        return self.state.deployments[deployment].target

    def condition(self, kind: str, deployment: str = "digits-v1"):
        return next((c for c in self.statuses[deployment].conditions if c.type == kind), None)

    def die(self, name: str, ending: str = "killed") -> None:
        worker = self.workers[name]
        worker.running = replace(worker.running, alive=False, ending=ending)
        worker.silent = True

    def _report(self, worker: Worker) -> ReplicaReport:
        running = worker.running
        ready: ReplicaState = "ready" if self.now >= worker.ready_at else "starting"
        state: ReplicaState = "failed" if worker.failed else "draining" if running.draining_since else ready
        return ReplicaReport(
            replica=running.replica,
            deployment=running.deployment,
            generation=running.generation,
            host="h",
            pid=running.pid,
            state=state,
            message=worker.failed or worker.remark,
            death=worker.death,
            phases_ms=worker.phases_ms,
            inflight=worker.inflight,
            jobs=worker.jobs,
            completed=worker.completed,
            busy_ms=worker.busy_ms,
            call_ms=self.call_ms,
            sequences=worker.sequences,
            sequence_slots=self.sequence_slots,
        )

    def _do(self, action) -> None:
        match action:
            case Launch():
                assert action.replica not in self.workers, "a name was used twice"
                self.launched.append((self.now, action.replica))
                if self.fail_launch:
                    self.launch_failures[action.replica] = self.fail_launch
                    return
                running = Running(
                    replica=action.replica,
                    deployment=action.deployment.name,
                    slot=action.slot,
                    generation=action.generation,
                    pid=1000 + len(self.launched),
                    alive=True,
                    launched_at=self.now,
                    fingerprint=fingerprint(action.deployment),
                    drain_limit_s=action.deployment.drain_limit_s,
                )
                self.workers[action.replica] = Worker(running, self.now + self.start_s, failed=self.fail_load)
            case Drain():
                worker = self.workers[action.replica]
                worker.running = replace(worker.running, draining_since=self.now)
            case Kill():
                self.killed.append((self.now, action.replica, action.cause))
                self.workers.pop(action.replica, None)


@pytest.fixture(scope="session")
def make_world() -> type[World]:
    """Return the World class. The session scope lets property tests use it."""
    return World


@pytest.fixture(scope="session")
def deployment():
    """Return a function that builds a Deployment ``digits-v1`` with the given fields."""
    return a_deployment

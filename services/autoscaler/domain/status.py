"""Build the status of each Deployment, for operators and the router."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from services.autoscaler.domain.cold_start import start_time
from services.autoscaler.domain.desired_state import DesiredStateIndex, index_of
from services.autoscaler.domain.launcher import Running, fingerprint
from services.autoscaler.domain.memory import DeploymentMemory, Phase, ReplicaMemory, State
from services.autoscaler.domain.model_deaths import starts_again, unhealthy
from services.autoscaler.domain.plural import counted
from services.autoscaler.domain.replica_health import phase_of
from services.autoscaler.domain.rules import ReplicaCounts, predicted_wait_ms
from services.autoscaler.domain.snapshot import Snapshot
from tidegate.kernel.protocol.deployment_status import Condition, DeploymentStatus
from tidegate.kernel.protocol.models import Deployment
from tidegate.kernel.protocol.presence import ReplicaReport

ColdStarts = Mapping[str, Sequence[dict[str, Any]]]


def statuses(
    snapshot: Snapshot,
    state: State,
    previous: Mapping[str, DeploymentStatus],
    cold_starts: ColdStarts,
    now: float,
) -> dict[str, DeploymentStatus]:
    """Return the status of every Deployment, by name.

    ``previous`` has the last statuses. A condition that has not changed keeps the time of its last change.
    """
    if snapshot.desired_state is None:
        return dict(previous)
    found: dict[str, DeploymentStatus] = {}
    known = index_of(snapshot.desired_state)
    running: dict[str, list[Running]] = {}
    for each in snapshot.running or ():
        if each.alive:
            running.setdefault(each.deployment, []).append(each)
    for deployment in snapshot.desired_state.deployments:
        memory = state.deployments.get(deployment.name)
        if memory is not None:
            mine = running.get(deployment.name, [])
            status = _status(deployment, memory, mine, known, snapshot, state, now)
            status.cold_starts = list(cold_starts.get(deployment.name, ()))
            status.conditions = _dated(status.conditions, previous.get(deployment.name))
            found[deployment.name] = status
    return found


def _status(
    deployment: Deployment,
    memory: DeploymentMemory,
    running: list[Running],
    known: DesiredStateIndex,
    snapshot: Snapshot,
    state: State,
    now: float,
) -> DeploymentStatus:
    reports = snapshot.reports or {}
    phases = [_phase(state.replicas.get(r.replica), reports.get(r.replica)) for r in running]
    inflight = sum(reports[r.replica].inflight for r in running if r.replica in reports)
    load, target = memory.seen, memory.wanted
    demand = load.demand if load else None
    start_s = start_time(state, deployment.name)
    fleet = ReplicaCounts(phases.count("ready"), phases.count("starting"), start_s or 0.0)
    mine = [reports[r.replica] for r in running if r.replica in reports]
    gpus = load.gpu_utilization if load else None
    price = deployment.scaling.price_per_hour
    status = DeploymentStatus(
        deployment=deployment.name,
        revision=deployment.revision,
        desired=memory.target,
        ready=phases.count("ready"),
        starting=phases.count("starting"),
        draining=phases.count("draining"),
        queue=None if demand is None or snapshot.reports is None else max(0, demand - inflight),
        demand=demand,
        arrival_rate=load.arrival_rate if load else None,
        service_rate=load.service_rate if load else None,
        utilization=load.utilization if load else None,
        gpu_utilization=gpus,
        gpu_memory_bytes=None if gpus is None else sum(r.gpu_memory_bytes or 0 for r in mine),
        devices=sorted({report.device for report in mine if report.device}),
        predicted_wait_ms=predicted_wait_ms(load, fleet) if load else None,
        start_s=start_s,
        cost_per_hour=None if price is None else price * len(running),
        rule=memory.rule,
        reason=target.reason if target else "",
        limits=(target.low, target.high) if target else None,
        replicas=[replica_view(r, reports.get(r.replica), state.replicas.get(r.replica)) for r in running],
        ended=[asdict(end) for end in memory.ended],
    )
    status.conditions = list(_conditions(deployment, memory, status, running, known, snapshot, now))
    return status


def replica_view(
    running: Running, report: ReplicaReport | None, memory: ReplicaMemory | None
) -> dict[str, Any]:
    """Return a replica's data for JSON: its heartbeat, if it has one, and what the launcher reports."""
    report = report or ReplicaReport(
        replica=running.replica,
        deployment=running.deployment,
        generation=running.generation,
        host="",
        pid=running.pid,
        state="starting",
    )
    known: dict[str, Any] = {
        "state": _phase(memory, report),
        "slot": running.slot,
        "launched_at": running.launched_at,
    }
    if running.memory_mb:
        known["memory_mb"] = running.memory_mb
    if running.worker:
        known["worker"] = running.worker
    if running.image:
        known["image"] = running.image
    if running.image or running.gpus:
        known["gpus"] = list(running.gpus)
    reported = {name: getattr(report, name) for name in ReplicaReport.__dataclass_fields__}
    for name, part in (("death", report.death), ("llm", report.llm)):
        reported[name] = asdict(part) if part is not None else None
    return {**reported, **known, "last_report": memory.last_report if memory else None}


def _phase(memory: ReplicaMemory | None, report: ReplicaReport | None) -> Phase:
    """Return a replica's phase. A replica that is loading its model again is not ready."""
    phase = phase_of(memory)
    return "starting" if phase == "ready" and starts_again(report) else phase


def _conditions(
    deployment: Deployment,
    memory: DeploymentMemory,
    status: DeploymentStatus,
    running: list[Running],
    known: DesiredStateIndex,
    snapshot: Snapshot,
    now: float,
) -> Iterable[Condition]:
    yield _ready(status, memory, now)
    if snapshot.host in snapshot.cordoned:
        text = f"no replica is started on {snapshot.host}: an operator cordoned it"
        yield _condition("Placeable", False, "Cordoned", text, now)
    elif memory.wanted is not None and memory.wanted.asked is not None:
        yield _condition("Placeable", False, "HostFull", memory.wanted.reason, now)
    if memory.start.failures:
        yield _condition("Loaded", False, memory.start.reason, _failed_starts(memory, now), now)
    elif status.ready:
        yield _condition("Loaded", True, "Loaded", "", now)
    reports = snapshot.reports or {}
    mine = [reports[r.replica] for r in running if r.replica in reports]
    yield unhealthy(deployment.name, mine, now) or _healthy(memory, now)
    known_demand = status.demand is not None
    missing = "" if known_demand else "a gateway or the store does not report, so nothing is scaled down"
    yield _condition("DemandKnown", known_demand, "Reported" if known_demand else "Unknown", missing, now)
    current = fingerprint(deployment)
    old = sum(r.fingerprint != current and r.draining_since is None for r in running)
    runs = f"{old} replicas still run" if old != 1 else "1 replica still runs"
    message = f"{runs} the former configuration" if old else ""
    yield _condition("Current", not old, "RollingOut" if old else "Current", message, now)
    if known.version_of(deployment) is None:
        text = f"the registry lists no version {deployment.version} of model {deployment.model}"
        yield _condition("VersionKnown", False, "VersionUnknown", text, now)


def _ready(status: DeploymentStatus, memory: DeploymentMemory, now: float) -> Condition:
    if status.desired == 0:
        paused = memory.rule == "override"
        text = (
            "an operator set the number of replicas to 0"
            if paused
            else "no replica; the first request starts one"
        )
        return _condition("Ready", True, "Paused" if paused else "Asleep", text, now)
    if status.ready >= status.desired:
        return _condition("Ready", True, "Ready", "", now)
    text = f"{status.ready} of {status.desired} ready, {status.starting} starting"
    reason = "Starting" if status.starting else "NoReplica"
    return _condition("Ready", False, reason, text, now)


def _failed_starts(memory: DeploymentMemory, now: float) -> str:
    wait = max(0.0, memory.start.not_before - now)
    next_start = f"the next start is in {wait:.0f} s" if wait else "the next start is due"
    return f"{memory.start.message} ({counted(memory.start.failures, 'failed start')}; {next_start})"


def _healthy(memory: DeploymentMemory, now: float) -> Condition:
    looping = [(slot, m) for slot, m in memory.slots.items() if m.failures > 1]
    if not looping:
        return _condition("Healthy", True, "Healthy", "", now)
    slot, worst = max(looping, key=lambda found: found[1].failures)
    wait = max(0.0, worst.not_before - now)
    failed = f"the replicas of slot {slot} failed {worst.failures} times in a row"
    text = f"{failed}; the next start is in {wait:.0f} s: {worst.message}"
    return _condition("Healthy", False, "CrashLoop", text, now)


def _condition(kind: str, ok: bool, reason: str, message: str, now: float) -> Condition:
    return Condition(type=kind, ok=ok, reason=reason, message=message, at=now)


def _dated(conditions: list[Condition], previous: DeploymentStatus | None) -> list[Condition]:
    """Return the conditions. A condition that has not changed keeps its earlier time."""
    before = {c.type: c for c in previous.conditions} if previous else {}
    return [
        c.model_copy(update={"at": old.at})
        if (old := before.get(c.type)) is not None and (old.ok, old.reason) == (c.ok, c.reason)
        else c
        for c in conditions
    ]

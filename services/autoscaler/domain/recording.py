"""Write snapshots as documents and read them back, round by round.

Each round is stored as its difference from the previous round. A snapshot that is read back leads to the same
decisions. Fields that no decision uses are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import orjson
from pydantic import TypeAdapter

from services.autoscaler.domain.decide import decide
from services.autoscaler.domain.launcher import Running
from services.autoscaler.domain.memory import State
from services.autoscaler.domain.snapshot import Decision, Host, LocalOverride, Policy, Snapshot
from tidegate.kernel.protocol.models import DesiredState
from tidegate.kernel.protocol.presence import (
    EngineReport,
    GatewayLoad,
    GatewayReport,
    GatewayView,
    ReplicaReport,
)

Section = dict[str, Any]
Document = dict[str, Any]

_STATE: TypeAdapter[State] = TypeAdapter(State)
_RUNNING: TypeAdapter[Running] = TypeAdapter(Running)
_SECTIONS = (
    "running",
    "reports",
    "gateways",
    "jobs",
    "hints",
    "overrides",
    "launch_failures",
    "expected",
    "over_budget",
    "room",
)


class RecordedRound(NamedTuple):
    """One round: its time, its difference from the previous round, and its decisions."""

    now: float
    document: Document
    decisions: tuple[Decision, ...]


@dataclass(slots=True)
class LastRound:
    """The sections (parts of the snapshot) of the last round. The next round is compared with them."""

    sections: dict[str, Section | None] = field(default_factory=dict)
    desired_state: DesiredState | None = None


def write_round(snapshot: Snapshot, last: LastRound) -> Document:
    """Return the difference between ``snapshot`` and ``last``. Update ``last`` to this round."""
    document: Document = {"host": snapshot.host, "cordoned": sorted(snapshot.cordoned)}
    desired = snapshot.desired_state
    if not last.sections or (desired is not last.desired_state and desired != last.desired_state):
        document["intention"] = None if desired is None else desired.model_dump(mode="json")
        last.desired_state = desired
    fresh = _sections(snapshot)
    for name in _SECTIONS:
        now, before = fresh[name], last.sections.get(name)
        if now is None or before is None:
            if now is not before or name not in last.sections:
                document[name] = now
            continue
        changed = {key: value for key, value in now.items() if key not in before or before[key] != value}
        gone = [key for key in before if key not in now]
        if changed or gone:
            document[name] = {"+": changed, "-": gone}
    last.sections = fresh
    return document


def read_round(document: Document, last: LastRound) -> Snapshot:
    """Return the snapshot that :func:`write_round` stored. Update ``last`` to this round."""
    if "intention" in document:
        desired = document["intention"]
        last.desired_state = None if desired is None else DesiredState.model_validate(desired)
    for name in _SECTIONS:
        if name not in document:
            continue
        changes, before = document[name], last.sections.get(name)
        if changes is None or before is None:
            last.sections[name] = changes
        else:
            left = {key: value for key, value in before.items() if key not in set(changes["-"])}
            last.sections[name] = {**left, **changes["+"]}
    return _snapshot(document, last)


def write_state(state: State) -> Document:
    """Return a state as a document."""
    generations = [[name, slot, generation] for (name, slot), generation in state.generations.items()]
    plain = _STATE.dump_python(replace(state, generations={}), mode="json")
    return {**plain, "generations": generations}


def read_state(document: Document) -> State:
    """Return the state that :func:`write_state` stored in ``document``."""
    generations = {(name, slot): generation for name, slot, generation in document["generations"]}
    return replace(_STATE.validate_python({**document, "generations": {}}), generations=generations)


def write_chunk(policy: Policy, before: State | None, rounds: Iterable[RecordedRound]) -> Document:
    """Return a chunk of consecutive rounds as a document.

    ``before``: the state before the first round. If it is given, the first round is stored in full, and the
    chunk can be read alone. If it is None, the chunk continues the previous chunk.
    """
    return {
        "policy": asdict(policy),
        "state": None if before is None else write_state(before),
        "rounds": [[each.now, each.document, [asdict(d) for d in each.decisions]] for each in rounds],
    }


def decide_again(chunks: Iterable[Document]) -> Iterator[tuple[float, list[Document], list[Document]]]:
    """Decide each recorded round again. Yield its time, the recorded decisions and the new decisions.

    The first chunk must have the state before its first round.
    """
    state, last = State(), LastRound()
    for chunk in chunks:
        policy = Policy(**chunk["policy"])
        if chunk["state"] is not None:
            state, last = read_state(chunk["state"]), LastRound()
        for now, document, before in chunk["rounds"]:
            plan, state = decide(read_round(document, last), policy, state, now)
            # Convert the new decisions to JSON and back. The recorded decisions also come from JSON, in which
            # a tuple is a list.
            yield now, before, [orjson.loads(orjson.dumps(asdict(d))) for d in plan.decisions]


def _sections(snapshot: Snapshot) -> dict[str, Section | None]:
    reports, gateways, running = snapshot.reports, snapshot.gateways, snapshot.running
    return {
        "running": None if running is None else {each.replica: _running(each) for each in running},
        "reports": None if reports is None else {name: _report(each) for name, each in reports.items()},
        "gateways": None if gateways is None else _gateways(gateways),
        "jobs": None if snapshot.jobs is None else dict(snapshot.jobs),
        "hints": dict(snapshot.hints),
        "overrides": {name: _override(each) for name, each in snapshot.overrides.items()},
        "launch_failures": dict(snapshot.launch_failures),
        "expected": dict(snapshot.expected),
        "over_budget": dict(snapshot.over_budget),
        "room": None if snapshot.room is None else asdict(snapshot.room),
    }


def _override(override: LocalOverride) -> list[Any]:
    return [override.replicas, override.expires_at, *([True] if override.force else [])]


def _snapshot(document: Document, last: LastRound) -> Snapshot:
    found = last.sections
    running, reports, gateways = found["running"], found["reports"], found["gateways"]
    overrides, room = found["overrides"] or {}, found.get("room")
    return Snapshot(
        desired_state=last.desired_state,
        running=None if running is None else tuple(map(_read_running, _sorted(running).values())),
        reports=None
        if reports is None
        else {name: _read_report(each) for name, each in _sorted(reports).items()},
        gateways=None if gateways is None else _read_gateways(_sorted(gateways)),
        jobs=found["jobs"],
        hints=found["hints"] or {},
        overrides={name: LocalOverride(*fields) for name, fields in overrides.items()},
        launch_failures=found["launch_failures"] or {},
        expected=found["expected"] or {},
        # Recordings by an earlier version of Tidegate do not have this section.
        over_budget=found.get("over_budget") or {},
        host=document["host"],
        cordoned=frozenset(document["cordoned"]),
        room=None if room is None else Host(**room),
    )


def _sorted(section: Mapping[str, Any]) -> Section:
    return dict(sorted(section.items()))


def _running(running: Running) -> Section:
    # Some fields almost always have their default. Such a field is written only if it has another value.
    plain = {
        "replica": running.replica,
        "deployment": running.deployment,
        "slot": running.slot,
        "generation": running.generation,
        "pid": running.pid,
        "alive": running.alive,
        "launched_at": running.launched_at,
        "fingerprint": running.fingerprint,
        "drain_limit_s": running.drain_limit_s,
    }
    if running.draining_since is not None:
        plain["draining_since"] = running.draining_since
    if running.ending:
        plain["ending"] = running.ending
    if running.out_of_memory:
        plain["out_of_memory"] = True
    if running.memory_mb:
        plain["memory_mb"] = running.memory_mb
    return plain


def _read_running(plain: Section) -> Running:
    return _RUNNING.validate_python(plain)


def _report(report: ReplicaReport) -> list[Any]:
    decoupled = bool((report.signature or {}).get("decoupled"))
    return [
        report.replica,
        report.deployment,
        report.generation,
        report.state,
        report.message,
        report.phases_ms.get("environment"),
        report.inflight,
        report.completed,
        report.failed,
        report.busy_ms,
        report.call_ms,
        report.batch_mean,
        report.jobs,
        decoupled,
        report.gpu_utilization,
        *_optional(report),
    ]


def _optional(report: ReplicaReport) -> list[Any]:
    """Return the fields that only some replicas report: the engine's report and the sequences."""
    engine = None if report.llm is None else asdict(report.llm)
    if report.sequence_slots:
        return [engine, [report.sequences, report.sequence_slots]]
    return [] if engine is None else [engine]


def _read_report(plain: list[Any]) -> ReplicaReport:
    replica, deployment, generation, state, message, environment, inflight, completed = plain[:8]
    failed, busy_ms, call_ms, batch_mean, jobs, decoupled, gpu_utilization, *more = plain[8:]
    engine, kept = [*more, None, None][:2]
    sequences, slots = kept or (0, 0)
    return ReplicaReport(
        replica=replica,
        deployment=deployment,
        generation=generation,
        host="",
        pid=0,
        state=state,
        message=message,
        phases_ms={} if environment is None else {"environment": environment},
        inflight=inflight,
        completed=completed,
        failed=failed,
        busy_ms=busy_ms,
        call_ms=call_ms,
        batch_mean=batch_mean,
        jobs=jobs,
        signature={"decoupled": True} if decoupled else None,
        gpu_utilization=gpu_utilization,
        llm=EngineReport.of(engine) if engine else None,
        sequences=sequences,
        sequence_slots=slots,
    )


def _gateways(view: GatewayView) -> Section:
    """Return the gateways' loads by incarnation and Deployment.

    Each gateway also has an entry with only its incarnation as key and None as value. So a gateway without
    load is stored too.
    """
    plain: Section = {" missing": sorted(view.missing)}
    for gateway in view.reports:
        plain[gateway.incarnation] = None
        for name, load in gateway.deployments.items():
            waiting = [load.waiting, load.waiting_tokens] if load.waiting else []
            plain[f"{gateway.incarnation} {name}"] = [load.outstanding, load.arrived, *waiting]
    return plain


def _read_gateways(plain: Section) -> GatewayView:
    reports: dict[str, GatewayReport] = {}
    for key, value in plain.items():
        if key == " missing":
            continue
        incarnation, _, name = key.partition(" ")
        gateway = reports.setdefault(incarnation, GatewayReport(incarnation, 0.0))
        if name:
            outstanding, arrived, waiting, tokens = (*value, 0, 0)[:4]
            gateway.deployments[name] = GatewayLoad(
                outstanding=outstanding, arrived=arrived, waiting=waiting, waiting_tokens=tokens
            )
    return GatewayView(list(reports.values()), list(plain[" missing"]))

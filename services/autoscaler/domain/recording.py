"""Observations as documents that can be kept and read back: what ``decide`` saw, round by round.

Each round is kept as its difference to the one before. Read back, it is a snapshot that gives the very same
decisions; what no decision looks at is left out.
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
from tidegate.kernel.protocol.presence import GatewayLoad, GatewayReport, GatewayView, ReplicaReport

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
    "room",
)


class RecordedRound(NamedTuple):
    """One round: its time, its difference to the one before, and what was decided."""

    now: float
    document: Document
    decisions: tuple[Decision, ...]


@dataclass(slots=True)
class LastSections:
    """The sections of the last round, to tell the next one's difference from, or to lay it over."""

    sections: dict[str, Section | None] = field(default_factory=dict)
    desired_state: DesiredState | None = None


def written(snapshot: Snapshot, pages: LastSections) -> Document:
    """The difference of ``snapshot`` to ``pages``, which then are its."""
    document: Document = {"host": snapshot.host, "cordoned": sorted(snapshot.cordoned)}
    wanted = snapshot.desired_state
    if not pages.sections or (wanted is not pages.desired_state and wanted != pages.desired_state):
        document["intention"] = None if wanted is None else wanted.model_dump(mode="json")
        pages.desired_state = wanted
    fresh = _sections(snapshot)
    for name in _SECTIONS:
        now, before = fresh[name], pages.sections.get(name)
        if now is None or before is None:
            if now is not before or name not in pages.sections:
                document[name] = now
            continue
        changed = {key: value for key, value in now.items() if key not in before or before[key] != value}
        gone = [key for key in before if key not in now]
        if changed or gone:
            document[name] = {"+": changed, "-": gone}
    pages.sections = fresh
    return document


def read(document: Document, pages: LastSections) -> Snapshot:
    """The snapshot whose difference to ``pages`` the document is; they then are its."""
    if "intention" in document:
        wanted = document["intention"]
        pages.desired_state = None if wanted is None else DesiredState.model_validate(wanted)
    for name in _SECTIONS:
        if name not in document:
            continue
        told, before = document[name], pages.sections.get(name)
        if told is None or before is None:
            pages.sections[name] = told
        else:
            left = {key: value for key, value in before.items() if key not in set(told["-"])}
            pages.sections[name] = {**left, **told["+"]}
    return _snapshot(document, pages)


def write_state(state: State) -> Document:
    """A state as a document."""
    generations = [[name, slot, generation] for (name, slot), generation in state.generations.items()]
    plain = _STATE.dump_python(replace(state, generations={}), mode="json")
    return {**plain, "generations": generations}


def read_state(document: Document) -> State:
    """A state from its document."""
    generations = {(name, slot): generation for name, slot, generation in document["generations"]}
    return replace(_STATE.validate_python({**document, "generations": {}}), generations=generations)


def write_chunk(policy: Policy, before: State | None, rounds: Iterable[RecordedRound]) -> Document:
    """Rounds that follow each other. With the state ``before`` the first, which is told in full, a chunk
    stands by itself; without, it goes on where the chunk before it ended.
    """
    return {
        "policy": asdict(policy),
        "state": None if before is None else write_state(before),
        "rounds": [[each.now, each.document, [asdict(d) for d in each.decisions]] for each in rounds],
    }


def again(chunks: Iterable[Document]) -> Iterator[tuple[float, list[Document], list[Document]]]:
    """Decide every round of the chunks once more: its time, what was decided then, and what is now.

    The first chunk must be one that stands by itself.
    """
    state, pages = State(), LastSections()
    for chunk in chunks:
        policy = Policy(**chunk["policy"])
        if chunk["state"] is not None:
            state, pages = read_state(chunk["state"]), LastSections()
        for now, document, before in chunk["rounds"]:
            plan, state = decide(read(document, pages), policy, state, now)
            # As a document, as those of then are: there a tuple is a list.
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
        "room": None if snapshot.room is None else asdict(snapshot.room),
    }


def _override(override: LocalOverride) -> list[Any]:
    return [override.replicas, override.expires_at, *([True] if override.force else [])]


def _snapshot(document: Document, pages: LastSections) -> Snapshot:
    found = pages.sections
    running, reports, gateways = found["running"], found["reports"], found["gateways"]
    overrides, room = found["overrides"] or {}, found.get("room")
    return Snapshot(
        desired_state=pages.desired_state,
        running=None if running is None else tuple(map(_read_running, _sorted(running).values())),
        reports=None
        if reports is None
        else {name: _read_report(each) for name, each in _sorted(reports).items()},
        gateways=None if gateways is None else _read_gateways(_sorted(gateways)),
        jobs=found["jobs"],
        hints=found["hints"] or {},
        overrides={name: LocalOverride(*given) for name, given in overrides.items()},
        launch_failures=found["launch_failures"] or {},
        expected=found["expected"] or {},
        host=document["host"],
        cordoned=frozenset(document["cordoned"]),
        room=None if room is None else Host(**room),
    )


def _sorted(section: Mapping[str, Any]) -> Section:
    return dict(sorted(section.items()))


def _running(running: Running) -> Section:
    # The fields that mostly have their defaults are told when they have not.
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
    ]


def _read_report(plain: list[Any]) -> ReplicaReport:
    replica, deployment, generation, state, message, environment, inflight, completed = plain[:8]
    failed, busy_ms, call_ms, batch_mean, jobs, decoupled, gpu_utilization = plain[8:]
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
    )


def _gateways(view: GatewayView) -> Section:
    """By incarnation and Deployment, with an entry for the gateway itself: it may have no load yet."""
    plain: Section = {" missing": sorted(view.missing)}
    for gateway in view.reports:
        plain[gateway.incarnation] = None
        for name, load in gateway.deployments.items():
            plain[f"{gateway.incarnation} {name}"] = [load.outstanding, load.arrived]
    return plain


def _read_gateways(plain: Section) -> GatewayView:
    reports: dict[str, GatewayReport] = {}
    for key, value in plain.items():
        if key == " missing":
            continue
        incarnation, _, name = key.partition(" ")
        gateway = reports.setdefault(incarnation, GatewayReport(incarnation, 0.0))
        if name:
            gateway.deployments[name] = GatewayLoad(outstanding=value[0], arrived=value[1])
    return GatewayView(list(reports.values()), list(plain[" missing"]))

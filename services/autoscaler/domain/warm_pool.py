"""Workers that wait without a model: which to start, which to end, and whose kind a Deployment is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.autoscaler.domain.launcher import Running, pool_fingerprint, pool_of
from tidegate.kernel.protocol.models import Deployment, WarmPoolSpec
from tidegate.kernel.protocol.presence import ReplicaReport

START_GRACE_S = 5.0
SILENT_S = 15.0  # a worker that was heard before is given up after so long
BACKOFF_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class WarmClaim:
    """A replica that was offered to the pool: ``worker`` is who took it, None as long as that is not known.

    The rest is what the launcher cannot know of it, as in :class:`Running`.
    """

    replica: str
    fingerprint: str
    launched_at: float
    drain_limit_s: float
    worker: str | None = None


@dataclass(frozen=True, slots=True)
class PoolFailures:
    """Starts in a row that came to nothing, when the next may be, and the last one's message."""

    failures: int = 0
    not_before: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """When each worker was last heard (by its name), and what is wrong with a flavour."""

    heard: Mapping[str, float] = field(default_factory=dict)
    trouble: Mapping[str, PoolFailures] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The flavours to start a worker of, the workers to end (with the cause), and those that can be had."""

    launch: tuple[str, ...]
    kill: tuple[tuple[str, str], ...]
    idle: Mapping[str, frozenset[str]]


def pool_for(deployment: Deployment, flavours: Mapping[str, WarmPoolSpec]) -> str | None:
    """The flavour whose workers can be a replica of ``deployment``; None: there is none."""
    wanted = (deployment.image, deployment.resources)
    fitting = (name for name, each in sorted(flavours.items()) if (each.image, each.resources) == wanted)
    return next((name for name in fitting if flavours[name].workers), None)


def plan_pool(
    flavours: Mapping[str, WarmPoolSpec],
    waiting: Sequence[Running],
    reports: Mapping[str, ReplicaReport],
    memory: PoolMemory,
    now: float,
    evidence_since: float = 0.0,
) -> tuple[PoolPlan, PoolMemory]:
    """Hold every flavour at its number; ``waiting`` are all workers that no Deployment was given.

    Since ``evidence_since`` whoever lives could be heard.
    A worker that ends before it was given away counts as a failed start: the next waits 1, 2, 4.. 60 s.
    """
    heard = {r.replica: memory.heard.get(r.replica, 0.0) for r in waiting}
    heard |= {name: now for name in heard if name in reports and reports[name].state == "warm"}
    trouble = dict(memory.trouble)
    kill: list[tuple[str, str]] = []
    kept: dict[str, list[Running]] = {name: [] for name in flavours}
    for each in waiting:
        name = pool_of(each.deployment) or ""
        flavour = flavours.get(name)
        if flavour is None or each.fingerprint != pool_fingerprint(flavour):
            kill.append((each.replica, "configuration changed"))
        elif failure := _failure(
            each, flavour, reports.get(each.replica), heard[each.replica], now - evidence_since, now
        ):
            kill.append((each.replica, failure))
            trouble[name] = _once_more(trouble.get(name, PoolFailures()), failure, now)
        else:
            kept[name].append(each)
    launch: list[str] = []
    for name, flavour in flavours.items():
        # Those that can be had last: they are the ones to keep.
        rows = sorted(kept[name], key=lambda each: (heard[each.replica] > 0, -each.launched_at))
        surplus = rows[: max(0, len(rows) - flavour.workers)]
        kill += [(each.replica, "more than wanted") for each in surplus]
        kept[name] = rows[len(surplus) :]
        patient_until = trouble.get(name, PoolFailures()).not_before
        if now >= patient_until:
            launch += [name] * (flavour.workers - len(kept[name]))
        # One that was started since came up; those that were there before say nothing of new ones.
        if any(heard[each.replica] == now and each.launched_at >= patient_until for each in kept[name]):
            trouble.pop(name, None)
    idle = {
        name: frozenset(each.replica for each in rows if heard[each.replica] == now)
        for name, rows in kept.items()
    }
    return PoolPlan(tuple(launch), tuple(kill), idle), PoolMemory(heard, trouble)


def as_replica(worker: Running, claim: WarmClaim, parsed: tuple[str, int, int]) -> Running:
    """A worker of the pool as the replica that it is now; ``parsed`` are the parts of that name."""
    deployment, slot, generation = parsed
    return replace(
        worker,
        replica=claim.replica,
        deployment=deployment,
        slot=slot,
        generation=generation,
        launched_at=claim.launched_at,
        fingerprint=claim.fingerprint,
        drain_limit_s=claim.drain_limit_s,
        worker=worker.replica,
    )


def _failure(
    worker: Running,
    flavour: WarmPoolSpec,
    report: ReplicaReport | None,
    heard: float,
    evidence_s: float,
    now: float,
) -> str:
    """Why a worker is given up; empty: it is not. ``evidence_s``: for how long it could have been heard."""
    if not worker.alive:
        return worker.ending or "the worker's process is gone"
    if report is not None and report.state == "failed":
        return report.message or "the worker reports a failure without a message"
    if evidence_s <= SILENT_S:
        return ""
    if not heard and now - worker.launched_at > flavour.start_timeout_s + START_GRACE_S:
        return f"not there after {flavour.start_timeout_s:g} s"
    if heard and now - heard > SILENT_S:
        return f"no heartbeat for {SILENT_S:g} s"
    return ""


def _once_more(trouble: PoolFailures, message: str, now: float) -> PoolFailures:
    wait_s = min(BACKOFF_MAX_S, 2.0 ** min(trouble.failures, 16))
    return PoolFailures(trouble.failures + 1, now + wait_s, message)

"""Decide which workers of the warm pools to start and to end, and which pool serves a Deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from services.autoscaler.domain.launcher import Running, pool_fingerprint, pool_of
from tidegate.kernel.protocol.models import Deployment
from tidegate.kernel.protocol.presence import ReplicaReport
from tidegate.kernel.protocol.warm_pool import WarmPoolSpec

START_GRACE_S = 5.0
SILENT_S = 15.0  # seconds without a heartbeat after which a worker is replaced
BACKOFF_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class WarmClaim:
    """A replica that was offered to the workers of a pool.

    ``worker``: the name of the worker that became this replica; None if it is not known yet. The other fields
    are those of :class:`Running` that the launcher cannot know.
    """

    replica: str
    fingerprint: str
    launched_at: float
    drain_limit_s: float
    worker: str | None = None


@dataclass(frozen=True, slots=True)
class PoolFailures:
    """The consecutive failed starts of one pool.

    ``not_before`` is the earliest time of the next start. ``message`` describes the last failure.
    """

    count: int = 0
    not_before: float = 0.0
    message: str = ""


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """The time of each worker's last heartbeat, by worker, and the failed starts of each pool."""

    heartbeats: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, PoolFailures] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """The workers to start and to end, and the idle workers.

    ``launch`` has the pool of each worker to start. ``kill`` has the name of each worker to end, with the
    cause. ``idle`` has the names of the idle workers by pool.
    """

    launch: tuple[str, ...]
    kill: tuple[tuple[str, str], ...]
    idle: Mapping[str, frozenset[str]]


def pool_for(deployment: Deployment, pools: Mapping[str, WarmPoolSpec]) -> str | None:
    """Return the pool with workers that can become a replica of ``deployment``; None without such a pool."""
    needed = (deployment.image, deployment.resources)
    fitting = (name for name, each in sorted(pools.items()) if (each.image, each.resources) == needed)
    return next((name for name in fitting if pools[name].workers), None)


def plan_pool(
    pools: Mapping[str, WarmPoolSpec],
    waiting: Sequence[Running],
    reports: Mapping[str, ReplicaReport],
    memory: PoolMemory,
    now: float,
    evidence_since: float = 0.0,
) -> tuple[PoolPlan, PoolMemory]:
    """Plan which workers to start and which to end, so that every pool keeps its size.

    ``waiting``: all workers without a Deployment. ``evidence_since``: the time since which heartbeats can be
    read. If a worker ends before it gets a Deployment, this counts as a failed start. Then the next start
    waits: 1 s, 2 s, 4 s, up to 60 s.
    """
    heartbeats = {r.replica: memory.heartbeats.get(r.replica, 0.0) for r in waiting}
    heartbeats |= {name: now for name in heartbeats if name in reports and reports[name].state == "warm"}
    failures = dict(memory.failures)
    kill: list[tuple[str, str]] = []
    kept: dict[str, list[Running]] = {name: [] for name in pools}
    for each in waiting:
        name = pool_of(each.deployment) or ""
        spec = pools.get(name)
        if spec is None or each.fingerprint != pool_fingerprint(spec):
            kill.append((each.replica, "configuration changed"))
            continue
        heartbeat, report = heartbeats[each.replica], reports.get(each.replica)
        if failure := _failure(each, spec, report, heartbeat, now - evidence_since, now):
            kill.append((each.replica, failure))
            failures[name] = _once_more(failures.get(name, PoolFailures()), failure, now)
        else:
            kept[name].append(each)
    launch: list[str] = []
    for name, spec in pools.items():
        # Idle workers come last in the list, because surplus workers are taken from its beginning.
        rows = sorted(kept[name], key=lambda each: (heartbeats[each.replica] > 0, -each.launched_at))
        surplus = rows[: max(0, len(rows) - spec.workers)]
        kill += [(each.replica, "surplus") for each in surplus]
        kept[name] = rows[len(surplus) :]
        not_before = failures.get(name, PoolFailures()).not_before
        if now >= not_before:
            launch += [name] * (spec.workers - len(kept[name]))
        # A heartbeat sets the number of failures to 0 only if its worker was started after the pause that
        # followed the last failure.
        if any(heartbeats[each.replica] == now and each.launched_at >= not_before for each in kept[name]):
            failures.pop(name, None)
    idle = {
        name: frozenset(each.replica for each in rows if heartbeats[each.replica] == now)
        for name, rows in kept.items()
    }
    return PoolPlan(tuple(launch), tuple(kill), idle), PoolMemory(heartbeats, failures)


def as_replica(worker: Running, claim: WarmClaim, parsed: tuple[str, int, int]) -> Running:
    """Return a worker of the pool as the replica that it became.

    ``parsed``: the Deployment, the slot and the generation in the replica's name.
    """
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
    spec: WarmPoolSpec,
    report: ReplicaReport | None,
    heartbeats: float,
    evidence_s: float,
    now: float,
) -> str:
    """Return why a worker of the pool must be ended; empty if it is healthy.

    ``heartbeats``: the time of the worker's last heartbeat; 0 if it has sent none. ``evidence_s``: for how
    many seconds heartbeats could be read.
    """
    if not worker.alive:
        return worker.ending or "the worker's process has ended"
    if report is not None and report.state == "failed":
        return report.message or "the worker reports a failure without a message"
    if evidence_s <= SILENT_S:
        return ""
    if not heartbeats and now - worker.launched_at > spec.start_timeout_s + START_GRACE_S:
        return f"not ready after {spec.start_timeout_s:g} s"
    if heartbeats and now - heartbeats > SILENT_S:
        return f"no heartbeat for {SILENT_S:g} s"
    return ""


def _once_more(before: PoolFailures, message: str, now: float) -> PoolFailures:
    wait_s = min(BACKOFF_MAX_S, 2.0 ** min(before.count, 16))
    return PoolFailures(before.count + 1, now + wait_s, message)

"""Choose which replicas to start and which to drain, for a given target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from services.autoscaler.domain.launcher import replica_name
from services.autoscaler.domain.memory import DeploymentMemory
from services.autoscaler.domain.plural import counted
from services.autoscaler.domain.replica_health import Verdict
from services.autoscaler.domain.snapshot import Drain, Launch
from tidegate.kernel.protocol.models import Deployment, Version


def to_drain(verdicts: Iterable[Verdict], target: int, current: str) -> list[Drain]:
    """Return the replicas to drain: first replicas of an older configuration, then the surplus.

    A ready replica of an older configuration is drained only if enough other replicas are ready. Each group
    has this order: first the replicas that do not serve yet, then those with the fewest requests in flight,
    then the youngest.
    """
    active = [v for v in verdicts if v.active]
    fresh = [v for v in active if v.running.fingerprint == current]
    stale = [v for v in active if v.running.fingerprint != current]
    # A stale replica has an older configuration. If it reports and is not ready, it serves no request and is
    # drained now. Ready stale replicas are drained only while more replicas are ready than the target.
    serving = sum(v.phase == "ready" for v in active)
    leave = [v for v in stale if v.phase != "ready" and v.reported]
    replaceable = max(0, serving - target)
    leave += sorted((v for v in stale if v.phase == "ready"), key=_least_loss)[:replaceable]
    drains = [Drain(v.running.replica, "configuration changed") for v in leave]
    surplus = max(0, len(fresh) - target)
    return drains + [Drain(v.running.replica, "scale down") for v in sorted(fresh, key=_least_loss)[:surplus]]


def _least_loss(verdict: Verdict) -> tuple[bool, int, float, int]:
    running = verdict.running
    return verdict.phase == "ready", verdict.inflight, -running.launched_at, -running.slot


def to_launch(
    deployment: Deployment,
    version: Version,
    verdicts: Sequence[Verdict],
    target: int,
    memory: DeploymentMemory,
    generations: Mapping[tuple[str, int], int],
    cause: str,
    now: float,
) -> list[Launch]:
    """Return the replicas to start, each with the next generation of its replica slot.

    If a replica has crashed, its slot stays empty until its backoff is over, and no other slot replaces it.
    While starts fail, and while a changed configuration rolls out, one replica is started at a time.
    ``cause``: the cause of the launches that do not replace a replica.
    """
    kept = [v for v in verdicts if not v.ended]
    fresh = [v for v in kept if v.active and v.running.fingerprint == memory.fingerprint]
    stale = any(v.active and v.running.fingerprint != memory.fingerprint for v in kept)
    missing = target - len(fresh)
    starting = sum(v.phase == "starting" for v in fresh)
    if memory.start.failures and now < memory.start.not_before:
        return []
    if memory.start.failures or stale:
        missing = min(missing, 1 - starting)
    taken = {v.running.slot for v in kept}
    slots = _free_slots(taken, missing)
    causes = {v.running.slot: f"replaces {v.running.replica}: {v.ended}" for v in verdicts if v.ended}
    if memory.start.failures:
        cause = f"next try after {counted(memory.start.failures, 'failed start')}"
    elif stale:
        cause = "configuration changed"
    return [
        _launch(deployment, version, slot, generations, causes.get(slot, cause))
        for slot in slots
        if slot not in memory.slots or now >= memory.slots[slot].not_before
    ]


def _free_slots(taken: set[int], count: int) -> list[int]:
    free: list[int] = []
    slot = 0
    while len(free) < count:
        if slot not in taken:
            free.append(slot)
        slot += 1
    return free


def _launch(
    deployment: Deployment,
    version: Version,
    slot: int,
    generations: Mapping[tuple[str, int], int],
    cause: str,
) -> Launch:
    generation = generations.get((deployment.name, slot), 0) + 1
    name = replica_name(deployment.name, slot, generation)
    return Launch(name, slot, generation, deployment, version, cause)

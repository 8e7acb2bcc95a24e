"""How many replicas a Deployment needs.

The queue term. With N requests outstanding, R replicas, s ms of model time per request and c requests
sharing a call, a replica serves c at once while its share N/R - c waits, which takes (N/R - c)*s. That
stays within the target wait W for R >= N*s / (W + c*s). A single slow request thus asks for one replica
and not for s/W of them.

The rate term. Arrivals at rate L keep L*s replicas busy (Little's law); at a utilisation of u: L*s/u.

The larger of both counts at once on the way up; on the way down the largest of a window does. Every
rule is a function below that returns None when it does not apply; the first that does wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from services.autoscaler.domain.memory import DeploymentMemory, Load
from services.autoscaler.domain.snapshot import LocalOverride, Policy
from tidegate.protocol.models import Deployment


@dataclass(frozen=True, slots=True)
class Target:
    """The wanted number of replicas, by which rule, and the reason in words."""

    replicas: int
    rule: str
    reason: str


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the target depends on besides the load: who is there, who asked."""

    ready: int
    starting: int
    hint_at: float | None
    override: LocalOverride | None


def target(
    deployment: Deployment,
    load: Load,
    memory: DeploymentMemory,
    around: Circumstances,
    policy: Policy,
    now: float,
) -> tuple[Target, DeploymentMemory]:
    """The target of this round and the memory with it (last activity, recommendations, last step)."""
    hinted = around.hint_at is not None and now - around.hint_at < policy.hint_hold_s
    busy = load.demand is None or load.demand > 0 or load.new > 0 or hinted
    memory = replace(memory, last_active=now) if busy else memory
    asked = max(load.demand or 0, 1 if hinted else 0)
    wanted, why, memory = _wanted(deployment, load, asked, memory, around, policy, now)
    # Older recommendations that are not larger will never be the largest again.
    kept = [(at, n) for at, n in memory.recommended if at > now - policy.down_window_s and n > wanted]
    if load.demand is not None:
        memory = replace(memory, recommended=(*kept, (now, wanted)))
    held = kept[0][1] if kept else wanted
    found = (
        _overridden(around.override, now)
        or _unknown(deployment, load, hinted, memory)
        or _asleep(deployment, wanted, held, memory, policy, now)
        or _by_demand(deployment, wanted, held, why)
    )
    return found, replace(memory, target=found.replicas)


def recommend(load: Load, policy: Policy, target_wait_ms: float) -> int | None:
    """Replicas for a known load; None while the service rate is not known. Monotone in the load."""
    if load.demand is None or load.ms_per_request is None:
        return None
    # Against ceil(2.0000000001): a float's last digit is no reason for a replica.
    tiny = 1e-9
    spare = target_wait_ms + load.batch * load.ms_per_request
    queue = math.ceil(load.demand * load.ms_per_request / spare - tiny)
    busy = (load.arrival_rate or 0.0) * load.ms_per_request / 1000.0
    return max(queue, math.ceil(busy / policy.utilisation - tiny))


def bounded(deployment: Deployment, replicas: int) -> int:
    """``replicas`` within the Deployment's own bounds."""
    return max(deployment.min_replicas, min(deployment.max_replicas, replicas))


def _wanted(
    deployment: Deployment,
    load: Load,
    asked: int,
    memory: DeploymentMemory,
    around: Circumstances,
    policy: Policy,
    now: float,
) -> tuple[int, str, DeploymentMemory]:
    """What the load alone asks for, unbounded, and why."""
    known = recommend(load, policy, deployment.target_wait_ms)
    if known is not None:
        by = f" ({load.guess})" if load.guess else ""
        why = f"{load.demand} outstanding at {load.ms_per_request:.3g} ms each{by}"
        return max(known, 1 if asked else 0), why, memory
    if not asked:
        return 0, "nothing outstanding", memory
    why = f"{asked} outstanding, service rate not known yet"
    settled = around.starting == 0 and now - memory.last_step >= policy.step_every_s
    if asked > around.ready and settled:
        return max(memory.target, around.ready + 1), why, replace(memory, last_step=now)
    return max(memory.target, 1), why, memory


def _overridden(override: LocalOverride | None, now: float) -> Target | None:
    if override is None or override.replicas is None:
        return None
    if override.expires_at is not None and override.expires_at <= now:
        return None
    until = "" if override.expires_at is None else f" for {override.expires_at - now:.0f} s more"
    return Target(
        override.replicas,
        "override",
        f"an operator asked for {override.replicas}{until}",
    )


def _unknown(deployment: Deployment, load: Load, hinted: bool, memory: DeploymentMemory) -> Target | None:
    if load.demand is not None:
        return None
    held = bounded(deployment, max(memory.target, 1 if hinted else 0))
    return Target(
        held,
        "demand unknown",
        "a gateway or the store does not report: nothing is scaled down",
    )


def _asleep(
    deployment: Deployment, wanted: int, held: int, memory: DeploymentMemory, policy: Policy, now: float
) -> Target | None:
    if deployment.min_replicas > 0 or wanted > 0:
        return None
    if memory.target == 0:
        return Target(0, "asleep", "nothing outstanding; the first request wakes it")
    limit = policy.idle_s if deployment.scale_to_zero_after_s is None else deployment.scale_to_zero_after_s
    idle = now - memory.last_active
    if idle >= limit:
        return Target(0, "idle", f"idle for {idle:.0f} s, {limit:g} s are allowed")
    return None if held > 1 else Target(bounded(deployment, 1), "awake", f"idle for less than {limit:g} s")


def _by_demand(deployment: Deployment, wanted: int, held: int, why: str) -> Target:
    # One stays until the idle time is over, also where the minimum is 0.
    asked = max(held, 1)
    found = bounded(deployment, asked)
    if found > asked:
        return Target(found, "minimum", f"{why}; at least {found} are wanted")
    if found < asked:
        return Target(found, "maximum", f"{why} would take {asked}; at most {found} are allowed")
    if held > max(wanted, deployment.min_replicas, 1):
        return Target(found, "stabilising", f"{why}; {held} were needed within the window")
    if found > wanted:
        return Target(found, "minimum", f"{why}; {found} stay")
    return Target(found, "demand", why)

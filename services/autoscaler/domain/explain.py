"""Explain why a Deployment has its number of replicas, and what will change it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from services.autoscaler.domain.bounds import bounds
from services.autoscaler.domain.capacity import pace
from services.autoscaler.domain.cold_start import start_time
from services.autoscaler.domain.memory import DeploymentMemory, State
from services.autoscaler.domain.model_deaths import unhealthy
from services.autoscaler.domain.plural import counted
from services.autoscaler.domain.shaping import MINUTE_S
from services.autoscaler.domain.snapshot import Policy, Snapshot
from services.autoscaler.domain.target import effective_override
from services.autoscaler.domain.tuning import Tuning, tuning
from tidegate.kernel.protocol.models import Deployment


def policy_of(
    deployment: Deployment, policy: Policy, start_s: float, now: float, over_budget: str = ""
) -> dict[str, Any]:
    """Return a Deployment's options, the resulting values, and the current bounds."""
    return {
        "deployment": deployment.name,
        "given": {
            "min_replicas": deployment.min_replicas,
            "max_replicas": deployment.max_replicas,
            "scale_to_zero_after_s": deployment.scale_to_zero_after_s,
            "target_wait_ms": deployment.target_wait_ms,
            "scaling": deployment.scaling.changes(),
        },
        "effective": asdict(tuning(deployment, policy, start_s)),
        "bounds": asdict(bounds(deployment, now, start_s, over_budget)),
    }


def explain(
    deployment: Deployment, snapshot: Snapshot, state: State, policy: Policy, now: float
) -> dict[str, Any]:
    """Return the last target, the number of replicas that each rule wants, and what delays a change."""
    memory = state.deployments[deployment.name]
    target, load = memory.wanted, memory.seen
    start_s = start_time(state, deployment.name)
    tuned = tuning(deployment, policy, start_s or 0.0)
    return {
        "deployment": deployment.name,
        "desired": memory.target,
        "rule": memory.rule,
        "reason": target.reason if target else "",
        "signals": asdict(load) if load else None,
        "start_s": start_s,
        "needs": [asdict(term) for term in target.terms] if target else [],
        "policy": policy_of(
            deployment, policy, start_s or 0.0, now, snapshot.over_budget.get(deployment.name, "")
        ),
        "holds": list(_holds(deployment, memory, snapshot, tuned, policy, now)),
    }


def _holds(
    deployment: Deployment,
    memory: DeploymentMemory,
    snapshot: Snapshot,
    tuned: Tuning,
    policy: Policy,
    now: float,
) -> Iterator[str]:
    override = effective_override(deployment, snapshot.overrides.get(deployment.name))
    if override is not None and override.replicas is not None:
        left = None if override.expires_at is None else override.expires_at - now
        until = "until it is removed" if left is None else f"for {left:.0f} s more"
        if left is None or left > 0:
            beyond = ", even above the maximum" if override.force else ""
            yield f"an operator set the replicas to {override.replicas}{beyond}, {until}"
    needed = max((n for _, n in memory.recommended), default=0)
    if memory.recommended and needed > memory.recommended[-1][1]:
        at = next(at for at, n in memory.recommended if n == needed)
        left_s = _left(at, tuned, now)
        yield f"{needed} replicas were needed {now - at:.0f} s ago; they are kept for another {left_s:.0f} s"
    if now < memory.panic_until:
        yield f"after a sudden load, no replica is removed for another {memory.panic_until - now:.0f} s"
    yield from _limits(memory, tuned, now)
    if memory.start.failures:
        wait = max(0.0, memory.start.not_before - now)
        failed = counted(memory.start.failures, "failed start")
        yield f"{failed} ({memory.start.message}); the next start is in {wait:.0f} s"
    for slot, found in memory.slots.items():
        if found.not_before > now:
            wait = found.not_before - now
            yield f"the replica of slot {slot} failed; the next start is in {wait:.0f} s: {found.message}"
    mine = [r for r in (snapshot.reports or {}).values() if r.deployment == deployment.name]
    if (sick := unhealthy(deployment.name, mine, now)) is not None:
        yield sick.message
    # Problems of models that still serve: outputs that contradict the signature, a missing device.
    yield from (f"{r.replica}: {r.message}" for r in mine if r.state == "ready" and r.message)
    if memory.put_off:
        most = (
            f" (at most {pace(snapshot.room, policy)} start at the same time)"
            if snapshot.room is not None
            else ""
        )
        yield f"{memory.put_off} more replicas start when others are ready or have ended{most}"
    if snapshot.host in snapshot.cordoned:
        yield f"{snapshot.host} is cordoned: no replica is started there"


def _left(at: float, tuned: Tuning, now: float) -> float:
    return max(0.0, at + tuned.down_window_s - now)


def _limits(memory: DeploymentMemory, tuned: Tuning, now: float) -> Iterator[str]:
    recent = [change for at, change in memory.moves if now - at < MINUTE_S]
    up, down = sum(c for c in recent if c > 0), -sum(c for c in recent if c < 0)
    if tuned.max_up_per_minute is not None and up:
        yield f"{up} replicas were added in the last minute; max_up_per_minute is {tuned.max_up_per_minute}"
    if tuned.max_down_per_minute is not None and down:
        limit = tuned.max_down_per_minute
        yield f"{down} replicas were removed in the last minute; max_down_per_minute is {limit}"

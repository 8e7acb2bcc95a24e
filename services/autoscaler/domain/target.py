"""Compute the target: the largest need of the rules, shaped over time, within the bounds.

``rules.py`` computes the need. ``shaping.py`` decides how fast the target follows the need. ``bounds.py``
computes the smallest and the largest allowed target. Three cases come first: an override, an unknown demand,
and scale to zero. Each case has a function below, which returns None if the case does not apply. The first
case that applies decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from services.autoscaler.domain.bounds import ReplicaBounds, bounds
from services.autoscaler.domain.memory import DeploymentMemory, Load, RuleNeed, Target
from services.autoscaler.domain.rules import ReplicaCounts, burst, largest, rule_needs
from services.autoscaler.domain.shaping import Shaped, moved, remember, shape
from services.autoscaler.domain.snapshot import LocalOverride, Policy
from services.autoscaler.domain.tuning import Tuning, tuning
from tidegate.kernel.protocol.models import Deployment


@dataclass(frozen=True, slots=True)
class Circumstances:
    """The inputs of the target besides the load: the replicas, a demand event, an override.

    ``kept`` is True if a canary is compared with this Deployment. Then the Deployment keeps its replicas.
    ``over_budget`` is the message about a used-up budget; empty if no budget is used up.
    """

    fleet: ReplicaCounts
    hint_at: float | None
    override: LocalOverride | None
    kept: bool = False
    over_budget: str = ""


@dataclass(frozen=True, slots=True)
class Need:
    """The number of replicas that the load needs (``replicas``), the ``rule`` that demands them, and why.

    ``terms``: the numbers that all rules demand.
    """

    replicas: int
    rule: str
    why: str
    terms: tuple[RuleNeed, ...] = ()


def target(
    deployment: Deployment,
    load: Load,
    memory: DeploymentMemory,
    around: Circumstances,
    policy: Policy,
    now: float,
) -> tuple[Target, DeploymentMemory]:
    """Return the target of this round, and the Deployment's ``memory`` after this round."""
    start_s = around.fleet.start_s
    tuned = tuning(deployment, policy, start_s)
    limits = bounds(deployment, now, start_s, around.over_budget)
    hinted = around.hint_at is not None and now - around.hint_at < policy.hint_hold_s
    busy = load.demand is None or load.demand > 0 or load.new > 0 or hinted or load.sequences > 0
    memory = replace(memory, last_active=now) if busy else memory
    outstanding = max(load.at_least if load.demand is None else load.demand, 1 if hinted else 0)
    need, memory = _need(load, outstanding, memory, around.fleet, tuned, policy, now)
    need, memory = _panicked(need, load, memory, around.fleet, tuned, limits, now)
    panic = now < memory.panic_until
    known = load.demand is not None
    least, most, memory = remember(memory, need.replicas, tuned, now, known=known)
    found = (
        _overridden(around.override, limits, now)
        or _unknown(load, need, memory, limits)
        or _asleep(need, most, memory, tuned, limits, now)
        or _by_need(
            need,
            shape(memory, need.replicas, least, most, panic=panic, tuning=tuned, now=now),
            limits,
        )
    )
    if around.kept:
        found = _kept(found, memory, limits)
    found = replace(found, terms=need.terms, low=limits.low, high=limits.high)
    return found, moved(memory, found.replicas, now)


def _need(
    load: Load,
    outstanding: int,
    memory: DeploymentMemory,
    fleet: ReplicaCounts,
    tuned: Tuning,
    policy: Policy,
    now: float,
) -> tuple[Need, DeploymentMemory]:
    """Return the number of replicas that the load needs, without bounds."""
    found = rule_needs(load, outstanding, tuned, fleet)
    most = largest(found)
    first = 1 if outstanding else 0
    if load.ms_per_request is not None and most is not None:
        rule = "demand" if most.rule == "wait" else most.rule
        return Need(max(most.replicas, first), rule, most.why, tuple(found)), memory
    by_backlog = most.replicas if most else 0
    if not outstanding:
        return Need(by_backlog, "demand", "no request or job waits or runs", tuple(found)), memory
    why = f"{outstanding} requests and jobs wait or run; the time for each is not known yet"
    replicas, settled = max(memory.target, 1), now - memory.last_step >= policy.step_every_s
    if outstanding > fleet.ready and fleet.starting == 0 and settled:
        replicas, memory = max(memory.target, fleet.ready + 1), replace(memory, last_step=now)
    if most is not None and by_backlog >= replicas:
        return Need(by_backlog, most.rule, most.why, tuple(found)), memory
    return Need(replicas, "demand", why, (*found, RuleNeed("step", replicas, why))), memory


def _panicked(
    need: Need,
    load: Load,
    memory: DeploymentMemory,
    fleet: ReplicaCounts,
    tuned: Tuning,
    limits: ReplicaBounds,
    now: float,
) -> tuple[Need, DeploymentMemory]:
    """Return ``need``. In a panic, return the need of the last few seconds if it is larger.

    A panic begins when the larger of these two needs is several times the number of ready replicas. It ends
    one down window after the last round with such a large need.
    """
    if not tuned.panic_factor or load.demand is None:
        return need, memory
    sudden = burst(load, tuned)
    most = max(need.replicas, sudden.replicas if sudden else 0)
    if most > 1 and limits.hold(most) >= tuned.panic_factor * max(1, fleet.ready):
        memory = replace(memory, panic_until=now + tuned.down_window_s)
    if now < memory.panic_until and sudden is not None and sudden.replicas > need.replicas:
        every = (*need.terms, replace(sudden, rule="panic"))
        return Need(sudden.replicas, "panic", sudden.why, every), memory
    return need, memory


def _overridden(override: LocalOverride | None, limits: ReplicaBounds, now: float) -> Target | None:
    if override is None or override.replicas is None:
        return None
    if override.expires_at is not None and override.expires_at <= now:
        return None
    until = "" if override.expires_at is None else f" for another {override.expires_at - now:.0f} s"
    request = f"an operator set the replicas to {override.replicas}{until}"
    if override.force or override.replicas <= limits.high:
        return Target(override.replicas, "override", request)
    allowed = limits.high_words or f"max_replicas is {limits.high}"
    return Target(limits.high, "override", f"{request}; {allowed}, so the target is {limits.high}")


def _unknown(load: Load, need: Need, memory: DeploymentMemory, limits: ReplicaBounds) -> Target | None:
    if load.demand is not None:
        return None
    held = limits.hold(max(memory.target, need.replicas))
    silent = "a gateway or the store does not report, so nothing is scaled down"
    grown = f"; the known demand: {need.why}" if held > memory.target else ""
    return Target(held, "demand unknown", f"{silent}{grown}")


def _asleep(
    need: Need, held: int, memory: DeploymentMemory, tuned: Tuning, limits: ReplicaBounds, now: float
) -> Target | None:
    if limits.low > 0 or need.replicas > 0:
        return None
    if memory.target == 0:
        return Target(0, "asleep", "no request or job waits; the first one starts a replica")
    if memory.target > 1 and tuned.max_down_per_minute is not None:
        return None
    idle = now - memory.last_active
    if idle >= tuned.idle_s:
        return Target(0, "idle", f"idle for {idle:.0f} s; the limit is {tuned.idle_s:g} s")
    return None if held > 1 else Target(limits.hold(1), "awake", f"idle for less than {tuned.idle_s:g} s")


def _by_need(need: Need, shaped: Shaped, limits: ReplicaBounds) -> Target:
    # One replica stays until the idle time is over, even if the minimum is 0.
    shaped_need = max(shaped.replicas, 1)
    found = limits.hold(shaped_need)
    if found > shaped_need:
        minimum = limits.low_words or f"the minimum is {found}"
        return Target(found, limits.low_rule, f"{need.why}; {minimum}")
    if found < shaped_need:
        maximum = limits.high_words or f"the maximum is {found}"
        return Target(found, limits.high_rule, f"{need.why}: {shaped_need} replicas are needed; {maximum}")
    if shaped.rule:
        return Target(found, shaped.rule, f"{need.why}; {shaped.words}")
    if shaped.held > max(need.replicas, limits.low, 1):
        return Target(
            found,
            "stabilising",
            f"{need.why}; {shaped.held} replicas were needed within the stabilization window",
        )
    if found > need.replicas:
        return Target(found, limits.low_rule, f"{need.why}; {found} stay")
    return Target(found, need.rule, need.why)


def _kept(found: Target, memory: DeploymentMemory, limits: ReplicaBounds) -> Target:
    """Return the target of a canary's baseline: at least the present target, except under an override."""
    held = min(memory.target, limits.high)
    if found.replicas >= held or found.rule == "override":
        return found
    return replace(
        found,
        replicas=held,
        rule="rollout",
        reason=(f"{found.reason}; {held} replicas stay until the canary has ended"),
    )


def effective_override(deployment: Deployment, local: LocalOverride | None) -> LocalOverride | None:
    """Return the override in effect: one that the registry does not have yet, else the registry's."""
    if local is not None:
        return local
    if deployment.override is None:
        return None
    expires = deployment.override.expires_at
    until = expires.timestamp() if expires else None
    return LocalOverride(deployment.override.replicas, until, deployment.override.force)

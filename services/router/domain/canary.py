"""Decide about a canary at each tick: hold, advance, promote, pause or roll back. Pure.

The canary's share of the traffic grows in steps. A step ends when its hold time is over, it has enough
requests, and no metric shows harm. After the step to 100 percent, no baseline is left. So this step is the
promotion, and it also needs evidence that the canary is not worse. Each metric that counts requests needs
this evidence. Metrics that count seconds do not need it. If evidence is missing for too long, the canary
pauses, and the reason of the decision names the missing evidence.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

from services.router.domain.canary_health import CanaryHealth
from services.router.domain.evidence import Evidence, Tick, upper_bound

Verdict = Literal["hold", "advance", "promote", "pause", "roll_back"]
Phase = Literal["running", "paused", "promoted", "rolled_back"]

STEPS = (1, 5, 25, 50, 100)
HEALTHY = CanaryHealth()
# The suffix of the metrics that count seconds. For example, ``slow`` counts requests and ``slow_seconds``
# counts seconds.
SECONDS = "_seconds"
# All metrics of seconds together get this share of ``CanaryPolicy.alpha``. The share is small, because the
# metrics of requests find harm sooner.
_ALPHA_OF_SECONDS = 0.05
# Four numbers for each metric, in the order of the first fields of ``Evidence``. The first two are ratios of
# the rates of bad events (canary to baseline): the largest accepted ratio, and the harmful ratio. The last
# two are the largest factors by which one block and one tick can multiply the evidence. A block is a period
# of BLOCK_S seconds (see ``evidence.py``). Latency has a finite factor for a block, because one stall of a
# replica makes many requests slow together. Errors come one by one, so their factors are infinite.
MARGINS = {
    "errors": (1.25, 2.0, inf, inf),
    "slow": (1.15, 1.6, 12.0, 3.0),
    "very_slow": (1.15, 2.0, 12.0, 3.0),
    "quality": (1.15, 1.5, inf, inf),
    "slow_seconds": (1.15, 1.6, 12.0, inf),
    "very_slow_seconds": (1.15, 2.0, 12.0, inf),
    "stalled_seconds": (1.25, 2.0, 12.0, inf),
}
_OF_SECONDS = sum(metric.endswith(SECONDS) for metric in MARGINS)
_OF_REQUESTS = len(MARGINS) - _OF_SECONDS - 1  # do not count quality: not every rollout judges it
OTHER_MARGINS = (1.15, 1.6, 12.0, 3.0)


@dataclass(frozen=True, slots=True)
class CanaryPolicy:
    """The settings for judging a canary.

    ``steps``: the canary's percentage of the traffic in each step. ``hold_s``: the shortest time of a step.
    ``min_samples``: the fewest requests of the canary in a step. ``alpha``: the accepted probability that a
    canary is rolled back although it is as good as its baseline. ``patience_s``: the time after which a step
    without enough evidence pauses the canary.

    ``tolerance``: a second way for a metric to pass the check before the promotion. The metric passes if the
    upper bound of the canary's rate of bad events is at most this much above the baseline's rate. This helps
    if the baseline has too few bad events for a comparison.
    """

    steps: tuple[int, ...] = STEPS
    hold_s: float = 60.0
    min_samples: int = 500
    alpha: float = 0.05
    tolerance: float = 0.01
    patience_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class CanaryState:
    """The state of a canary.

    ``step``: the index of the current step. ``since``: the time at which this step began, in seconds since
    the epoch. ``samples``: the canary's requests in this step. ``evidence``: the evidence on each metric,
    from all steps.
    """

    step: int = 0
    since: float = 0.0
    samples: int = 0
    phase: Phase = "running"
    reason: str = ""
    evidence: dict[str, Evidence] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CanaryDecision:
    """A verdict with its reason, and the state after it."""

    verdict: Verdict
    reason: str
    state: CanaryState


def share(policy: CanaryPolicy, state: CanaryState) -> int:
    """Return the percentage of the traffic that the canary gets."""
    if state.phase == "promoted":
        return 100
    return 0 if state.phase == "rolled_back" else policy.steps[state.step]


def judge(
    policy: CanaryPolicy,
    state: CanaryState,
    ticks: dict[str, Tick],
    requests: int,
    now: float,
    health: CanaryHealth = HEALTHY,
    unjudged: str = "",
) -> CanaryDecision:
    """Decide about a canary after one tick.

    ``ticks``: the counts of each metric since the last tick. ``requests``: the canary's requests since then.
    ``unjudged``: why a metric cannot be judged yet; empty if all metrics can be judged. As long as
    ``unjudged`` is not empty, the canary is not promoted. A promoted or rolled-back canary does not change
    its state. A paused canary can still be rolled back.
    """
    if state.phase in ("promoted", "rolled_back"):
        return CanaryDecision("hold", state.reason, state)
    evidence = dict(state.evidence)
    for metric, tick in ticks.items():
        evidence[metric] = evidence.get(metric, no_evidence(metric)).add(tick, now)
    state = replace(state, evidence=evidence, samples=state.samples + requests)
    harm = health.broken or _harm(policy, evidence)
    if harm:
        return CanaryDecision("roll_back", harm, replace(state, phase="rolled_back", reason=harm))
    if state.phase == "paused":
        return CanaryDecision("hold", state.reason, state)
    return _progress(policy, state, now, health.waits, unjudged)


def _progress(
    policy: CanaryPolicy, state: CanaryState, now: float, waits: str, unjudged: str
) -> CanaryDecision:
    """Return the decision about a canary that shows no harm.

    ``waits``: why the canary gets no requests now; empty if nothing prevents them.
    """
    following = policy.steps[state.step + 1 :]
    last = not following or following[0] >= 100
    lacking = [*([waits] if waits else ()), *missing(policy, state, now, last=last)]
    lacking += [unjudged] if unjudged and last else []
    if not lacking:
        if last:
            reason = f"as good as the baseline: {_summary(state.evidence)}"
            return CanaryDecision("promote", reason, replace(state, phase="promoted", reason=reason))
        reason = f"step {state.step + 1} of {len(policy.steps)} is over without harm"
        after = replace(state, step=state.step + 1, since=now, samples=0, reason=reason)
        return CanaryDecision("advance", reason, after)
    reason = "; ".join(lacking)
    if now - state.since >= policy.patience_s:
        reason = f"not enough evidence after {policy.patience_s:g} s in a step: {reason}"
        return CanaryDecision("pause", reason, replace(state, phase="paused", reason=reason))
    return CanaryDecision("hold", reason, replace(state, reason=reason))


def missing(policy: CanaryPolicy, state: CanaryState, now: float, *, last: bool) -> list[str]:
    """Return the conditions that the current step does not meet yet.

    ``last``: True if the promotion follows. Then the step also needs evidence that the canary is fine.
    """
    lacking = []
    left = policy.hold_s - (now - state.since)
    if left > 0:
        lacking.append(f"the step lasts at least {left:.0f} s more")
    if state.samples < policy.min_samples:
        lacking.append(f"{policy.min_samples - state.samples} more requests of the canary are needed")
    if last:
        for name, each in state.evidence.items():
            if decides_promotion(name) and (lack := _unproven(policy, name, each)):
                lacking.append(lack)
    return lacking


def no_evidence(metric: str) -> Evidence:
    """Return the evidence about a metric before its first tick."""
    return Evidence(*MARGINS.get(metric, OTHER_MARGINS))


def decides_promotion(metric: str) -> bool:
    """Return True if a promotion needs evidence about a metric.

    Metrics of seconds have too few events for such evidence.
    """
    return not metric.endswith(SECONDS)


def roll_back_at(policy: CanaryPolicy, evidence: Container[str], metric: str) -> float:
    """Return the e-value at which a metric rolls a canary back.

    There are two kinds of metrics: metrics of requests and metrics of seconds. Each kind gets a part of
    alpha. The e-value is the number of metrics of the same kind as ``metric``, divided by the part of alpha
    that this kind gets. This number includes metrics that have no evidence yet, except ``quality``.
    """
    if metric.endswith(SECONDS):
        return _OF_SECONDS / (policy.alpha * _ALPHA_OF_SECONDS)
    same = _OF_REQUESTS + ("quality" in evidence)
    return same / (policy.alpha * (1 - _ALPHA_OF_SECONDS))


def _harm(policy: CanaryPolicy, evidence: dict[str, Evidence]) -> str:
    """Return why a canary must be rolled back; empty if it need not be.

    Slow requests cause a rollback only if the metric of slow seconds also points to harm. Without this
    condition, two stalls of a replica would cause a rollback, because a stall makes many requests slow
    together.
    """
    for metric, each in evidence.items():
        limit = roll_back_at(policy, evidence, metric)
        if not each.reaches(limit):
            continue
        seconds = evidence.get(metric + SECONDS)
        if seconds is None or seconds.reaches(1.0):
            canary, base = each.rates
            what = "seconds" if metric.endswith(SECONDS) else "requests"
            return (
                f"{metric}: {canary:.2%} of {each.canary} canary {what}, against {base:.2%} of {each.base} "
                f"baseline {what} (e-value {each.e_worse:.3g}, limit {limit:.3g})"
            )
    return ""


def _unproven(policy: CanaryPolicy, metric: str, each: Evidence) -> str:
    """Return as text what is missing to show that a metric is fine; empty if nothing is missing."""
    e_fine = each.e_fine
    if e_fine >= 1 / policy.alpha:
        return ""
    bound = upper_bound(each.canary_bad, each.canary, policy.alpha)
    accepted = each.rates[1] + policy.tolerance
    if bound <= accepted:
        return ""
    return (
        f"{metric}: no evidence yet that the canary is less than {each.harmful:g} times as bad as the "
        f"baseline (e-value {e_fine:.3g}; {1 / policy.alpha:.3g} is enough), or that the canary's rate "
        f"of bad events is at most {accepted:.2%} (upper bound: {bound:.2%})"
    )


def _summary(evidence: dict[str, Evidence]) -> str:
    parts = []
    for metric, each in evidence.items():
        if not decides_promotion(metric):
            continue
        canary, base = each.rates
        parts.append(f"{metric} {canary:.2%} against {base:.2%}")
    return ", ".join(parts) or "no metric was reported"

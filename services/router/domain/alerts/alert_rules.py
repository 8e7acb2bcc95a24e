"""The alert rules. Each rule checks one endpoint, and has an equal condition for Prometheus. Pure.

The burn rates follow "Alerting on SLOs" in Google's SRE workbook (chapter 5). Each rule compares a long and a
short window. The long one shows that the error budget is at risk. The short one shows that the problem still
exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from services.router.domain.alerts.facts import DAY, FIVE_MINUTES, HOUR, Counts, Facts
from tidegate.kernel.protocol.service_level import ServiceLevel

Severity = Literal["critical", "warning"]
LEAST_REQUESTS = 20

# Default limits: percent of failed requests, p99 as a multiple of its baseline, seconds in the queue, dead
# letters in 15 minutes, unexpected ends of replicas in 15 minutes.
ERROR_RATE = 5.0
P99_RATIO = 2.0
QUEUE_AGE_S = 10.0
DEAD_LETTERS = 1
RESTARTS = 3


@dataclass(frozen=True, slots=True)
class Breach:
    """A rule's condition that holds now. ``value`` is measured, and ``limit`` is the rule's limit.

    ``subject``: the version or Deployment that causes the condition; empty if the whole endpoint is meant.
    """

    value: float
    limit: float
    summary: str
    subject: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule for alerts. Its alert fires when ``check`` has found a breach for ``for_s`` seconds.

    The alert is resolved when ``check`` has found no breach for ``keep_s`` seconds. ``expression``: the same
    condition for Prometheus, on the router's metrics. ``remedy``: a command with the placeholder
    ``{endpoint}``.
    """

    name: str
    severity: Severity
    for_s: float
    description: str
    check: Callable[[Facts], Iterator[Breach]]
    expression: str
    remedy: str
    keep_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Burn:
    """A long and a short window for a rule about burn rates.

    ``budget``: the share of the error budget that may be used up in the long window. The rule's condition
    holds if the burn rates of both windows are above the rate that uses up this share.
    """

    long_s: float
    short_s: float
    budget: float


FAST = (Burn(HOUR, FIVE_MINUTES, 0.02), Burn(6 * HOUR, 1800.0, 0.05))
SLOW = (Burn(3 * DAY, 6 * HOUR, 0.10),)


def factor(burn: Burn, slo: ServiceLevel) -> float:
    """Return the burn rate that uses up ``burn.budget`` of the error budget in the long window.

    Example: a burn rate of 14.4 uses up 2 % of the error budget of 30 days in one hour.
    """
    return burn.budget * slo.window_s / burn.long_s


def _error_rate(facts: Facts) -> Iterator[Breach]:
    limit = facts.limits.error_rate or ERROR_RATE
    window = facts.recent
    percent = 100 * window.error_rate
    if window.requests >= LEAST_REQUESTS and percent > limit:
        worst = _worst_reason(window.outcomes)
        yield Breach(
            percent,
            limit,
            f"{percent:.1f} % of {window.requests} requests failed in 5 minutes, mostly {worst} "
            f"(limit {limit:g} %)",
        )


def _worst_reason(outcomes: dict[str, int]) -> str:
    reasons = {name: count for name, count in outcomes.items() if name not in ("ok", "caller_gone")}
    return max(reasons, key=lambda name: reasons[name], default="errors")


def _burning(
    burns: tuple[Burn, ...], bad: Callable[[Counts], int], objective: str
) -> Callable[..., Iterator[Breach]]:
    def check(facts: Facts) -> Iterator[Breach]:
        slo = facts.slo
        target = None if slo is None else _target(slo, objective)
        if slo is None or target is None:
            return
        for burn in burns:
            long, short = (facts.totals.get(each, Counts()) for each in (burn.long_s, burn.short_s))
            limit = factor(burn, slo)
            rates = [_rate(counts, bad, target) for counts in (long, short)]
            if long.requests >= LEAST_REQUESTS and min(rates) > limit:
                left = f"at this rate the budget of {slo.window} lasts {slo.window_s / HOUR / rates[1]:.1f} h"
                yield Breach(
                    rates[0],
                    limit,
                    f"{objective}: the burn rate of the error budget is {rates[0]:.1f} (limit "
                    f"{limit:.3g}, over {_span(burn.long_s)} and {_span(burn.short_s)}); {left}",
                )
                return

    return check


def _target(slo: ServiceLevel, objective: str) -> float | None:
    if objective == "availability":
        return slo.availability
    return slo.latency_target if slo.latency_ms is not None else None


def _rate(counts: Counts, bad: Callable[[Counts], int], target: float) -> float:
    """Return the burn rate. At 1, the budget is used up exactly when its window ends."""
    return bad(counts) / counts.requests / (1 - target / 100) if counts.requests else 0.0


def _span(seconds: float) -> str:
    for unit, size in (("d", DAY), ("h", HOUR)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds / 60:g} min"


def _p99(facts: Facts) -> Iterator[Breach]:
    now, usual = facts.recent.quantile_s(0.99), facts.baseline
    if now is None or usual is None or facts.recent.timed() < LEAST_REQUESTS:
        return
    limit = max(usual.p99_s * (facts.limits.p99_ratio or P99_RATIO), usual.high_s)
    if now > limit:
        yield Breach(
            now,
            limit,
            f"p99 is {now * 1e3:.3g} ms in the last 5 minutes; usually it is {usual.p99_s * 1e3:.3g} ms "
            f"(limit {limit * 1e3:.3g} ms)",
        )


def _queue_age(facts: Facts) -> Iterator[Breach]:
    limit = facts.limits.queue_age_s or QUEUE_AGE_S
    if facts.queue_age_s > limit:
        text = f"a new request waits about {facts.queue_age_s:.0f} s (limit {limit:g} s)"
        yield Breach(facts.queue_age_s, limit, text)


def _dead_letters(facts: Facts) -> Iterator[Breach]:
    count, limit = facts.quarter.dead, facts.limits.dead_letters or DEAD_LETTERS
    if count >= limit:
        yield Breach(count, limit, f"{count} requests or jobs were given up in 15 minutes (limit {limit})")


def _flapping(facts: Facts) -> Iterator[Breach]:
    count, limit = facts.quarter.restarts, facts.limits.restarts or RESTARTS
    if count >= limit:
        text = f"replicas or their models ended unexpectedly {count} times in 15 minutes (limit {limit})"
        yield Breach(count, limit, text)


def _found(rule: str) -> Callable[[Facts], Iterator[Breach]]:
    def check(facts: Facts) -> Iterator[Breach]:
        for each in facts.findings:
            if each.rule == rule:
                yield Breach(each.value, each.limit, each.summary, each.subject)

    return check


_E = "tidegate_endpoint"


def _limit(rule: str) -> str:
    return f'on (endpoint) {_E}_alert_limit{{rule="{rule}"}}'


def _increase(metric: str, span: str) -> str:
    return f"increase({_E}_{metric}_total[{span}])"


def _burn_expression(burns: tuple[Burn, ...], metric: str, objective: str) -> str:
    budget = f'on (endpoint) {_E}_slo_budget{{objective="{objective}"}}'

    def rate(seconds: float) -> str:
        span = f"{seconds:.0f}s"
        return f"({_increase(metric, span)} / {_increase('requests', span)} / {budget})"

    def part(burn: Burn) -> str:
        limit = f"on (endpoint) ({burn.budget * DAY / burn.long_s:.6g} * {_E}_slo_days)"
        enough = f"on (endpoint) {_increase('requests', f'{burn.long_s:.0f}s')} >= {LEAST_REQUESTS}"
        return f"({rate(burn.long_s)} > {limit} and {rate(burn.short_s)} > {limit} and {enough})"

    return " or ".join(map(part, burns))


def _bad(counts: Counts) -> int:
    return counts.failed


def _late(counts: Counts) -> int:
    return min(counts.requests, counts.slow + counts.failed)


def _burn_rules() -> Iterator[Rule]:
    for objective, title, bad, metric in (
        ("availability", "ErrorBudget", _bad, "failed"),
        ("latency", "LatencyBudget", _late, "late"),
    ):
        what = "failed requests" if objective == "availability" else "slow or failed requests"
        remedy = "tidegate diagnose {endpoint}"
        yield Rule(
            f"{title}Burn", "critical", 120.0,
            f"{what} use up the error budget within hours or days",
            _burning(FAST, bad, objective), _burn_expression(FAST, metric, objective), remedy,
        )  # fmt: skip
        yield Rule(
            f"{title}BurnSlow", "warning", 3600.0,
            f"{what} use up the error budget before its window ends",
            _burning(SLOW, bad, objective), _burn_expression(SLOW, metric, objective), remedy,
        )  # fmt: skip


RULES: tuple[Rule, ...] = (
    Rule(
        "ErrorRate", "critical", 60.0, "too many requests fail because of the service", _error_rate,
        f"100 * {_increase('failed', '5m')} / {_increase('requests', '5m')} > {_limit('ErrorRate')} "
        f"and on (endpoint) {_increase('requests', '5m')} >= {LEAST_REQUESTS}",
        "tidegate diagnose {endpoint}",
    ),
    *_burn_rules(),
    Rule(
        "LatencyAboveBaseline", "warning", 300.0, "p99 is far above the endpoint's own past", _p99,
        f"{_E}_p99_seconds > {_limit('LatencyAboveBaseline')}",
        "tidegate diagnose {endpoint}",
    ),
    Rule(
        "QueueAge", "warning", 60.0, "requests wait too long for a replica", _queue_age,
        f"{_E}_queue_age_seconds > {_limit('QueueAge')}",
        "tidegate why {endpoint}",
    ),
    Rule(
        "DeadLetters", "warning", 0.0, "requests or jobs were given up", _dead_letters,
        f"{_E}_dead_letters_recent >= {_limit('DeadLetters')}",
        "tidegate dead",
    ),
    Rule(
        "ReplicaFlapping", "warning", 0.0, "replicas or their models end unexpectedly", _flapping,
        f"{_E}_restarts_recent >= {_limit('ReplicaFlapping')}",
        "tidegate logs {endpoint}",
    ),
    Rule(
        "Drift", "warning", 0.0, "the inputs or outputs differ from the baseline", _found("Drift"),
        f'{_E}_finding{{rule="Drift"}} == 1',
        "tidegate drift {endpoint}",
    ),
    Rule(
        "QualityDrop", "critical", 0.0, "the answers are worse than before", _found("QualityDrop"),
        f'{_E}_finding{{rule="QualityDrop"}} == 1',
        "tidegate quality {endpoint}",
    ),
    Rule(
        "CostCap", "warning", 0.0, "the cost reaches its cap", _found("CostCap"),
        f'{_E}_finding{{rule="CostCap"}} == 1',
        "tidegate costs {endpoint}",
    ),
)  # fmt: skip
BY_NAME = {rule.name: rule for rule in RULES}


def breaches(facts: Facts, rules: tuple[Rule, ...] = RULES) -> dict[tuple[str, str, str], Breach]:
    """Return the conditions that hold now, by endpoint, rule and subject."""
    return {
        (facts.endpoint, rule.name, breach.subject): breach
        for rule in rules
        if rule.name not in facts.limits.off
        for breach in rule.check(facts)
    }


def limits_of(facts: Facts) -> dict[str, float]:
    """Return the limit of each enabled rule that compares one value with one limit.

    The router publishes these limits as metrics, which the rules for Prometheus read.
    """
    given = facts.limits
    found: dict[str, float] = {
        "ErrorRate": given.error_rate or ERROR_RATE,
        "QueueAge": given.queue_age_s or QUEUE_AGE_S,
        "DeadLetters": given.dead_letters or DEAD_LETTERS,
        "ReplicaFlapping": given.restarts or RESTARTS,
    }
    if facts.baseline is not None:
        ratio = given.p99_ratio or P99_RATIO
        found["LatencyAboveBaseline"] = max(facts.baseline.p99_s * ratio, facts.baseline.high_s)
    return {name: limit for name, limit in found.items() if name not in given.off}

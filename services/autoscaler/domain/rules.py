"""What each rule asks for: replicas as a function of the load, and why. The largest counts.

*wait*. With N requests outstanding, R replicas, s ms of model time per request and c requests sharing a
call, a replica serves c at once while its share N/R - c waits, which takes (N/R - c)*s. That stays within
the target wait W for R >= N*s / (W + c*s). A single slow request thus asks for one replica and not for s/W
of them. With k model instances in a replica, k calls go on at once: R >= N*(s/k) / (W + c*s). A queue that
those who are there will have worked off before another one could be ready asks for nobody: what counts is
N + (L - R*k/s)*S, with arrivals at rate L and a start that takes S.

*utilization*. Arrivals at rate L keep L*s/k replicas busy (Little's law); at a utilization of u: L*s/(k*u).
Where u was asked for, what the replicas (or their GPUs) measure of themselves counts as well: at the measure
U, R of them do the work of R*U/u, as the Kubernetes HPA has it, with its tolerance of a tenth.

*backlog*. N / (requests that each replica may have outstanding).

*trend* and *forecast*: the rate that there will be when a replica that is started now is ready.

Every rule grows with the load: with N, with each rate and with U.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from services.autoscaler.domain.memory import Load, RuleNeed
from services.autoscaler.domain.tuning import Tuning

# Against ceil(2.0000000001): a float's last digit is no reason for a replica.
TINY = 1e-9
TOLERANCE = 0.1
# A trend is believed up to this many times the rate that there is.
TREND_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class ReplicaCounts:
    """Who is there to serve: replicas that are ready, that start, and what a start takes (seconds)."""

    ready: int = 0
    starting: int = 0
    start_s: float = 0.0


def terms(load: Load, asked: int, tuning: Tuning, fleet: ReplicaCounts) -> list[RuleNeed]:
    """What every rule asks for that has what it needs; ``asked`` is the demand, as far as it is known."""
    found = [_wait(load, asked, tuning, fleet), _backlog(asked, tuning)]
    if load.ms_per_request is not None:
        each = f"at {load.ms_per_request:.3g} ms each"
        found.append(_by_rate("utilization", load.arrival_rate, each, load, tuning))
        rising = _ahead(load, tuning, fleet)
        found.append(_by_rate("trend", rising, f"in {fleet.start_s:.0f} s {each}", load, tuning))
        found.append(_by_rate("forecast", load.expected, f"soon, as before, {each}", load, tuning))
    if tuning.by_utilization:
        found.append(_measured(load, tuning, fleet))
    return [term for term in found if term is not None]


def burst(load: Load, tuning: Tuning) -> RuleNeed | None:
    """What the arrivals of the last few seconds alone ask for."""
    if load.ms_per_request is None:
        return None
    return _by_rate("utilization", load.burst_rate, f"at {load.ms_per_request:.3g} ms each", load, tuning)


def predicted_wait_ms(load: Load, fleet: ReplicaCounts) -> float | None:
    """How long a request that comes now would wait for its turn, in ms; None: not known.

    With nobody ready it waits for a start as well.
    """
    if load.demand is None or load.ms_per_request is None:
        return None
    if not fleet.ready and not fleet.start_s:
        return None
    start_ms = 0.0 if fleet.ready else fleet.start_s * 1000.0
    queued = max(0.0, load.demand / max(1, fleet.ready) - load.batch * load.slots)
    return start_ms + queued * load.ms_per_request / load.slots


def largest(found: Iterable[RuleNeed]) -> RuleNeed | None:
    """The term that asks for most; of equals the first."""
    return max(found, key=lambda term: term.replicas, default=None)


def _wait(load: Load, asked: int, tuning: Tuning, fleet: ReplicaCounts) -> RuleNeed | None:
    each_ms = load.ms_per_request
    if each_ms is None or load.service_rate is None:
        return None
    spare = tuning.wait_ms + load.batch * each_ms

    def needed(waiting: float) -> int:
        return math.ceil(waiting * each_ms / load.slots / spare - TINY)

    by = f" ({load.guess})" if load.guess else ""
    why = f"{asked} outstanding at {each_ms:.3g} ms each{by}"
    now, there = needed(asked), fleet.ready + fleet.starting
    if now <= there or tuning.impatient or not load.measured:
        return RuleNeed("wait", now, why)
    arriving = max(load.arrival_rate or 0.0, load.burst_rate or 0.0)
    left = max(0.0, asked + (arriving - fleet.ready * load.service_rate) * fleet.start_s)
    later = max(there, needed(left))
    if later >= now:
        return RuleNeed("wait", now, why)
    return RuleNeed("wait", later, f"{why}, {left:.0f} of them when another one could be ready")


def _backlog(asked: int, tuning: Tuning) -> RuleNeed | None:
    each = tuning.backlog_per_replica
    if each is None:
        return None
    return RuleNeed(
        "backlog", math.ceil(asked / each - TINY), f"{asked} outstanding, {each:g} for each replica"
    )


def _by_rate(rule: str, rate: float | None, words: str, load: Load, tuning: Tuning) -> RuleNeed | None:
    if rate is None:
        return None
    replicas = math.ceil(load.busy(rate) / tuning.utilization - TINY)
    return RuleNeed(rule, replicas, f"{rate:.3g} requests/s {words}, {tuning.utilization:.0%} busy at most")


def _ahead(load: Load, tuning: Tuning, fleet: ReplicaCounts) -> float | None:
    if load.arrival_rate is None or load.trend <= 0:
        return None
    rising = load.arrival_rate + load.trend * fleet.start_s * tuning.ahead
    return min(rising, load.arrival_rate * TREND_LIMIT) if tuning.ahead else None


def _measured(load: Load, tuning: Tuning, fleet: ReplicaCounts) -> RuleNeed | None:
    # While some start, the ones that are ready do the work of all.
    measures = [u for u in (load.utilization, load.gpu_utilization) if u is not None]
    if not measures or fleet.starting or not fleet.ready:
        return None
    measured = max(measures)
    ratio = measured / tuning.utilization
    near = abs(ratio - 1.0) <= TOLERANCE
    replicas = fleet.ready if near else math.ceil(fleet.ready * ratio - TINY)
    words = f"{fleet.ready} replicas {measured:.0%} busy, {tuning.utilization:.0%} at most"
    return RuleNeed("busy", replicas, words)

"""The scaling rules: the replicas that the load needs, and why. The largest need counts.

*wait*. N requests are unanswered, R replicas serve them, and a request takes s ms of model time. A call has c
requests, so a replica serves c requests at a time. Each replica has N/R requests. The last of them waits (N/R
- c)*s ms. This is at most the target wait W if R >= N*s / (W + c*s). So a single slow request needs one
replica and not s/W of them. With k model instances in a replica, k calls run at the same time: R >= N*(s/k) /
(W + c*s). If the current replicas can empty the queue before a new one is ready, the rule does not scale up.
To decide this, it replaces N by the number of requests at that time. This number is N + (L - R*k/s)*S, with
an arrival rate L and a start time S.

*utilization*. Arrivals at rate L keep L*s/k replicas busy (Little's law). If replicas may be busy for a share
u of the time, L*s/(k*u) replicas are needed. If the Deployment sets u, the rule *busy* applies as well. It
uses the measured utilization U of the replicas or of their GPUs, whichever is higher. R replicas at
utilization U do the work of R*U/u replicas at utilization u, so this is the need. This is the formula of the
Kubernetes HPA, with its tolerance of a tenth.

*backlog*. The need is N / (number of requests per replica that the Deployment allows).

*sequences*, for stateful models. The need is (number of sequences that replicas keep) / (slots of a replica).
If no slot is free, unanswered requests count too, because each of them may start a sequence.

*tokens* and *kv*, for language models: see ``llm_rules.py``. An engine runs one request in each of its slots.
So c is the number of slots, and s is the time of a request divided by c.

*trend* and *forecast*. These are the utilization rule at a future rate: the rate that is expected when a
replica that starts now is ready.

Every need grows with the load: with N, with each rate and with U.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from services.autoscaler.domain.llm_rules import llm_needs, words
from services.autoscaler.domain.memory import Load, RuleNeed
from services.autoscaler.domain.tuning import Tuning

# Subtract this before `ceil`, so that a rounding error, such as 2.0000000001, does not add a replica.
TINY = 1e-9
TOLERANCE = 0.1
# A trend raises the rate to at most this many times the current one.
TREND_LIMIT = 2.0


@dataclass(frozen=True, slots=True)
class ReplicaCounts:
    """The numbers of ready and of starting replicas, and the seconds that a start takes."""

    ready: int = 0
    starting: int = 0
    start_s: float = 0.0


def rule_needs(load: Load, outstanding: int, tuning: Tuning, fleet: ReplicaCounts) -> list[RuleNeed]:
    """Return the need of every rule whose inputs are known. ``outstanding`` is the known demand."""
    found: list[RuleNeed | None] = [_wait(load, outstanding, tuning, fleet), _backlog(outstanding, tuning)]
    if load.ms_per_request is not None:
        each = f"at {load.ms_per_request:.3g} ms each"
        found.append(_by_rate("utilization", load.arrival_rate, each, load, tuning))
        rising = _ahead(load, tuning, fleet)
        found.append(_by_rate("trend", rising, f"in {fleet.start_s:.0f} s {each}", load, tuning))
        found.append(_by_rate("forecast", load.expected, f"expected soon {each}", load, tuning))
    if load.sequence_slots:
        found.append(_sequences(load, outstanding, fleet))
    if load.llm is not None:
        found += llm_needs(load.llm, tuning, fleet.ready, fleet.start_s)
    if tuning.by_utilization:
        found.append(_measured(load, tuning, fleet))
    return [term for term in found if term is not None]


def burst(load: Load, tuning: Tuning) -> RuleNeed | None:
    """Return how many replicas the arrivals of the last seconds need; None if service times are not known."""
    if load.ms_per_request is None:
        return None
    return _by_rate("utilization", load.burst_rate, f"at {load.ms_per_request:.3g} ms each", load, tuning)


def predicted_wait_ms(load: Load, fleet: ReplicaCounts) -> float | None:
    """Return how long a request that arrives now would wait, in ms; None if not known.

    If no replica is ready, this includes the time of a start.
    """
    if load.demand is None or load.ms_per_request is None:
        return None
    if not fleet.ready and not fleet.start_s:
        return None
    start_ms = 0.0 if fleet.ready else fleet.start_s * 1000.0
    queued = max(0.0, load.demand / max(1, fleet.ready) - load.batch * load.slots)
    return start_ms + queued * load.ms_per_request / load.slots


def largest(found: Iterable[RuleNeed]) -> RuleNeed | None:
    """Return the largest need. If several are equal, return the first of them."""
    return max(found, key=lambda term: term.replicas, default=None)


def _wait(load: Load, outstanding: int, tuning: Tuning, fleet: ReplicaCounts) -> RuleNeed | None:
    each_ms = load.ms_per_request
    if each_ms is None or load.service_rate is None:
        return None
    spare = tuning.wait_ms + load.batch * each_ms

    def needed(waiting: float) -> int:
        return math.ceil(waiting * each_ms / load.slots / spare - TINY)

    by = f" ({load.guess})" if load.guess else ""
    why = f"{outstanding} requests and jobs at {each_ms:.3g} ms each{by}"
    if load.llm is not None:
        why = f"{words(load.llm)}; {each_ms * load.batch / 1e3:.3g} s each{by}"
    now, there = needed(outstanding), fleet.ready + fleet.starting
    if now <= there or tuning.impatient or not load.measured:
        return RuleNeed("wait", now, why)
    arriving = max(load.arrival_rate or 0.0, load.burst_rate or 0.0)
    left = max(0.0, outstanding + (arriving - fleet.ready * load.service_rate) * fleet.start_s)
    later = max(there, needed(left))
    if later >= now:
        return RuleNeed("wait", now, why)
    return RuleNeed("wait", later, f"{why}; {left:.0f} of them will remain when a new replica is ready")


def _backlog(outstanding: int, tuning: Tuning) -> RuleNeed | None:
    each = tuning.backlog_per_replica
    if each is None:
        return None
    return RuleNeed(
        "backlog",
        math.ceil(outstanding / each - TINY),
        f"{outstanding} requests and jobs; a replica may have {each:g}",
    )


def _sequences(load: Load, outstanding: int, fleet: ReplicaCounts) -> RuleNeed:
    full = load.sequences >= fleet.ready * load.sequence_slots
    kept = load.sequences + (outstanding if full else 0)
    words = f"{load.sequences} sequences; a replica can keep {load.sequence_slots}"
    return RuleNeed("sequences", math.ceil(kept / load.sequence_slots), words)


def _by_rate(rule: str, rate: float | None, words: str, load: Load, tuning: Tuning) -> RuleNeed | None:
    if rate is None:
        return None
    replicas = math.ceil(load.busy(rate) / tuning.utilization - TINY)
    return RuleNeed(
        rule, replicas, f"{rate:.3g} requests/s {words}; a replica may be {tuning.utilization:.0%} busy"
    )


def _ahead(load: Load, tuning: Tuning, fleet: ReplicaCounts) -> float | None:
    if load.arrival_rate is None or load.trend <= 0:
        return None
    rising = load.arrival_rate + load.trend * fleet.start_s * tuning.ahead
    return min(rising, load.arrival_rate * TREND_LIMIT) if tuning.ahead else None


def _measured(load: Load, tuning: Tuning, fleet: ReplicaCounts) -> RuleNeed | None:
    # While replicas start, the ready ones do all the work. Their utilization falls when the starting replicas
    # are ready, so it is not used now.
    measures = [u for u in (load.utilization, load.gpu_utilization) if u is not None]
    if not measures or fleet.starting or not fleet.ready:
        return None
    measured = max(measures)
    ratio = measured / tuning.utilization
    near = abs(ratio - 1.0) <= TOLERANCE
    replicas = fleet.ready if near else math.ceil(fleet.ready * ratio - TINY)
    words = f"{fleet.ready} replicas are {measured:.0%} busy; the limit is {tuning.utilization:.0%}"
    return RuleNeed("busy", replicas, words)

"""Measure the evidence that a canary is worse than its baseline, or that it is not harmful. Pure.

The evidence is valid at any time, however often it is read. A metric counts bad events: errors, or requests
that are slower than a quantile of the baseline. This quantile is computed once and then does not change. Let
s be the canary's share of the requests. Let the canary's rate of bad events be r times the baseline's rate.
Then a bad event is the canary's with the probability p(r) = s*r / (1 - s + s*r).

Each tick multiplies the evidence by a likelihood ratio. This ratio compares two values of r: that of the
alternative hypothesis with that of the null hypothesis. The product is an e-process: under the null
hypothesis it exceeds 1/alpha with a probability of at most alpha, no matter how often it is read. The method
is from Lindon, Sanden and Shirikian, "Rapid Regression Detection in Software Deployments through Sequential
Testing", KDD 2022, arXiv 2205.14762. Here, the test is one-sided and has a margin.

The share s is computed for each tick, so it may change with the canary's steps.

Bad events are not independent: if a replica stalls for a second, all its requests are slow. So there is a
limit on the evidence that one tick adds, and a limit on the evidence that one block of ``BLOCK_S`` seconds
adds. A limit only makes the evidence smaller, so the guarantee still holds.

The same formula can judge seconds instead of requests. For slow requests, each second is one event of the
canary and one event of the baseline. The event is bad to a degree x from 0 to 1: the share of slow requests
in this second. For stalls, each second of a busy replica is one event.

Let a be the factor by which a completely bad event multiplies the evidence. An event of degree x multiplies
it by a**x, which is at most 1 + x * (a - 1). So under the null hypothesis, the expected factor is at most 1.
The requests of one second may depend on each other in any way.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import exp, inf, lgamma, log, log1p
from operator import add

# Each alternative hypothesis is a value of r, the ratio of the canary's rate of bad events to the baseline's.
# For ``Evidence.worse``, r is ``Evidence.margin`` times a factor in WORSE. For ``Evidence.fine``, r is
# ``Evidence.harmful`` times a factor in BETTER.
WORSE = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
BETTER = (0.8, 0.67, 0.5, 0.33, 0.2, 0.1, 0.03)
BLOCK_S = 10.0
_NONE_WORSE, _NONE_FINE = (0.0,) * len(WORSE), (0.0,) * len(BETTER)
# An e-value with a greater logarithm is treated as infinite, because exp would overflow.
_MAX_LOG = 700.0


@dataclass(frozen=True, slots=True)
class Tick:
    """The counts of one tick: requests and bad events, of the canary and of the baseline.

    Some metrics judge seconds instead of requests. For slow seconds, ``canary`` and ``base`` are 1, and
    ``canary_bad`` and ``base_bad`` are from 0 to 1. For stalled seconds, ``canary`` and ``base`` count busy
    replicas, and ``canary_bad`` and ``base_bad`` count stalled replicas.
    """

    canary: int
    canary_bad: float
    base: int
    base_bad: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence about one metric: a logarithm of a likelihood ratio for each alternative hypothesis.

    ``worse``: evidence against "the canary is at most ``margin`` times as bad as the baseline". ``fine``:
    evidence against "the canary is at least ``harmful`` times as bad". Both contain only complete blocks.
    ``open_worse`` and ``open_fine`` contain the current ``block``. One block multiplies the evidence by at
    most ``block_factor``, and one tick by at most ``tick_factor``.
    """

    margin: float
    harmful: float
    block_factor: float = inf
    tick_factor: float = inf
    worse: tuple[float, ...] = _NONE_WORSE
    fine: tuple[float, ...] = _NONE_FINE
    block: int = 0
    open_worse: tuple[float, ...] = _NONE_WORSE
    open_fine: tuple[float, ...] = _NONE_FINE
    canary: int = 0
    canary_bad: float = 0
    base: int = 0
    base_bad: float = 0

    def add(self, tick: Tick, now: float) -> Evidence:
        """Return the evidence with one more tick.

        The tick is ignored if the canary or the baseline has no requests. ``now``: the time of the tick in
        seconds.
        """
        if tick.canary <= 0 or tick.base <= 0:
            return self
        share = tick.canary / (tick.canary + tick.base)
        block = int(now // BLOCK_S)
        worse, fine, open_worse, open_fine = self.worse, self.fine, self.open_worse, self.open_fine
        if block != self.block:
            worse, fine = self._limited(worse, open_worse), self._limited(fine, open_fine)
            open_worse, open_fine = _NONE_WORSE, _NONE_FINE
        if tick.canary_bad or tick.base_bad:
            most = log(self.tick_factor)
            open_worse = _added(open_worse, _steps(WORSE, self.margin, share), tick, most)
            open_fine = _added(open_fine, _steps(BETTER, self.harmful, share), tick, most)
        return Evidence(
            self.margin, self.harmful, self.block_factor, self.tick_factor,
            worse, fine, block, open_worse, open_fine,
            self.canary + tick.canary, self.canary_bad + tick.canary_bad,
            self.base + tick.base, self.base_bad + tick.base_bad,
        )  # fmt: skip

    def _limited(self, sums: tuple[float, ...], gains: tuple[float, ...]) -> tuple[float, ...]:
        most = log(self.block_factor)
        if max(gains) <= most:
            return tuple(map(add, sums, gains))
        return tuple(total + (gain if gain < most else most) for total, gain in zip(sums, gains, strict=True))

    @property
    def e_worse(self) -> float:
        """Return the e-value. If it is large, the canary is worse than ``margin`` allows."""
        return _mean_exp(self._limited(self.worse, self.open_worse))

    def reaches(self, limit: float) -> bool:
        """Return True if :attr:`e_worse` is at least ``limit``. This call is faster than :attr:`e_worse`."""
        logs = self._limited(self.worse, self.open_worse)
        return max(logs) >= log(limit) and _mean_exp(logs) >= limit

    @property
    def e_fine(self) -> float:
        """Return the e-value. If it is large, the canary is not harmful."""
        return _mean_exp(self._limited(self.fine, self.open_fine))

    @property
    def rates(self) -> tuple[float, float]:
        """Return the canary's rate of bad events, then the baseline's; 0 without requests."""
        return self.canary_bad / max(self.canary, 1), self.base_bad / max(self.base, 1)


def _added(
    sums: tuple[float, ...], steps: tuple[tuple[float, float], ...], tick: Tick, most: float
) -> tuple[float, ...]:
    """Return the log-likelihood ratio of each alternative hypothesis after one more tick.

    ``most``: the largest value that one tick may add.
    """
    bad, base_bad = tick.canary_bad, tick.base_bad
    found = []
    for total, (ours, theirs) in zip(sums, steps, strict=True):
        gain = bad * ours + base_bad * theirs
        found.append(total + (gain if gain < most else most))
    return tuple(found)


@lru_cache(1024)  # the canary's share of the requests is the same in many ticks, so results repeat
def _steps(alternatives: tuple[float, ...], null: float, share: float) -> tuple[tuple[float, float], ...]:
    """Return what one bad event adds to the log-likelihood ratio of each alternative hypothesis.

    Each pair: what an event of the canary adds, and what an event of the baseline adds.
    """
    p0 = _into_canary(null, share)
    into = [_into_canary(null * factor, share) for factor in alternatives]
    return tuple((log(p / p0), log((1 - p) / (1 - p0))) for p in into)


def _into_canary(ratio: float, share: float) -> float:
    """Return the probability that a bad event is the canary's if the canary is ``ratio`` times as bad."""
    return share * ratio / (1 - share + share * ratio)


def _mean_exp(logs: tuple[float, ...]) -> float:
    largest = max(logs)
    if largest > _MAX_LOG:
        return inf
    return sum(exp(each) for each in logs) / len(logs)


def upper_bound(bad: float, total: int, alpha: float) -> float:
    """Return an upper bound of the rate of bad events.

    With probability 1 - ``alpha``, the rate is below the bound at all times. The bound is the largest rate
    that the mixture of all binomial likelihoods under a uniform prior does not reject (Robbins, "Statistical
    methods related to the law of the iterated logarithm", 1970).
    """
    if bad >= total:
        return 1.0
    mixture = lgamma(bad + 1) + lgamma(total - bad + 1) - lgamma(total + 2) + log(alpha)
    low, high = bad / total, 1.0
    for _ in range(20):
        rate = (low + high) / 2
        if (bad and bad * log(rate)) + (total - bad) * log1p(-rate) <= mixture:
            high = rate
        else:
            low = rate
    return high

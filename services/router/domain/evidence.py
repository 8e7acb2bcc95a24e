"""Evidence that a canary is worse than its baseline, or that it is not. It may be read at any time. Pure.

Each metric is a bad event: an error, or a request that is slower than a frozen quantile of the baseline. If
the canary gets the share s of the requests and is r times as bad, a bad event falls into the canary with the
probability p(r) = s*r / (1 - s + s*r). A likelihood ratio between two values of r, multiplied from tick to
tick, is an e-process: under the null hypothesis it exceeds 1/alpha with a probability of at most alpha, no
matter how often it is read (Lindon, Sanden and Shirikian, "Rapid Regression Detection in Software
Deployments through Sequential Testing", KDD 2022, arXiv 2205.14762; here one-sided and with a margin).

The share is the one of each tick's requests, so the steps of a canary may change it.

Bad events are not independent: a replica that stalls for a second makes all its requests slow. So the gain of
one block of ``BLOCK_S`` seconds is limited. This only makes the evidence smaller, so its guarantee holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import exp, inf, lgamma, log, log1p

# The hypotheses, as multiples of the margin.
WORSE = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
BETTER = (0.8, 0.67, 0.5, 0.33, 0.2, 0.1, 0.03)
# Seconds of a block.
BLOCK_S = 10.0
# Above this, e-values are not computed: exp would overflow.
_MAX_LOG = 700.0


@dataclass(frozen=True, slots=True)
class Tick:
    """The requests of one tick, and those of them with a bad event, of canary and baseline."""

    canary: int
    canary_bad: int
    base: int
    base_bad: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """The evidence about one metric: the sums of a null hypothesis against each of its alternatives.

    ``worse`` rejects "at most ``margin`` times as bad as the baseline". ``fine`` rejects "at least
    ``harmful`` times as bad". Both are logarithms of likelihood ratios, up to the last complete block. The
    ``open`` ones are those of the current ``block``. One block multiplies the evidence by up to
    ``block_factor``.
    """

    margin: float
    harmful: float
    block_factor: float = inf
    worse: tuple[float, ...] = (0.0,) * len(WORSE)
    fine: tuple[float, ...] = (0.0,) * len(BETTER)
    block: int = 0
    open_worse: tuple[float, ...] = (0.0,) * len(WORSE)
    open_fine: tuple[float, ...] = (0.0,) * len(BETTER)
    canary: int = 0
    canary_bad: int = 0
    base: int = 0
    base_bad: int = 0

    def add(self, tick: Tick, now: float) -> Evidence:
        """Return the evidence with one more tick. A tick in which one side has no request adds none.

        ``now``: the time of the tick in seconds.
        """
        if tick.canary <= 0 or tick.base <= 0:
            return self
        share = tick.canary / (tick.canary + tick.base)
        closed = self._closed(int(now // BLOCK_S))
        return replace(
            closed,
            open_worse=_added(closed.open_worse, WORSE, self.margin, share, tick),
            open_fine=_added(closed.open_fine, BETTER, self.harmful, share, tick),
            canary=self.canary + tick.canary,
            canary_bad=self.canary_bad + tick.canary_bad,
            base=self.base + tick.base,
            base_bad=self.base_bad + tick.base_bad,
        )

    def _limited(self, sums: tuple[float, ...], gains: tuple[float, ...]) -> tuple[float, ...]:
        most = log(self.block_factor)
        return tuple(total + min(gain, most) for total, gain in zip(sums, gains, strict=True))

    def _closed(self, block: int) -> Evidence:
        """Return the evidence with the current block added, if ``block`` is another one."""
        if block == self.block:
            return self
        nothing = Evidence(self.margin, self.harmful)
        return replace(
            self,
            worse=self._limited(self.worse, self.open_worse),
            fine=self._limited(self.fine, self.open_fine),
            block=block,
            open_worse=nothing.open_worse,
            open_fine=nothing.open_fine,
        )

    @property
    def e_worse(self) -> float:
        """Return the e-value for "the canary is worse than the margin allows"."""
        return _mean_exp(self._limited(self.worse, self.open_worse))

    @property
    def e_fine(self) -> float:
        """Return the e-value for "the canary is not harmful"."""
        return _mean_exp(self._limited(self.fine, self.open_fine))

    @property
    def rates(self) -> tuple[float, float]:
        """Return the rates of bad events of canary and baseline; 0 without requests."""
        return self.canary_bad / max(self.canary, 1), self.base_bad / max(self.base, 1)


def _added(
    sums: tuple[float, ...], alternatives: tuple[float, ...], null: float, share: float, tick: Tick
) -> tuple[float, ...]:
    if not tick.canary_bad and not tick.base_bad:
        return sums
    p0 = _into_canary(null, share)
    found = []
    for total, factor in zip(sums, alternatives, strict=True):
        p = _into_canary(null * factor, share)
        gain = tick.canary_bad * log(p / p0) + tick.base_bad * log((1 - p) / (1 - p0))
        found.append(total + gain)
    return tuple(found)


def _into_canary(ratio: float, share: float) -> float:
    """Return the probability that a bad event falls into the canary if it is ``ratio`` times as bad."""
    return share * ratio / (1 - share + share * ratio)


def _mean_exp(logs: tuple[float, ...]) -> float:
    largest = max(logs)
    if largest > _MAX_LOG:
        return inf
    return sum(exp(each) for each in logs) / len(logs)


def upper_bound(bad: int, total: int, alpha: float) -> float:
    """Return an upper bound of a rate of bad events that holds at all times with probability 1 - ``alpha``.

    The bound is the largest rate that the mixture of all binomial likelihoods under a uniform prior does not
    reject (Robbins, "Statistical methods related to the law of the iterated logarithm", 1970).
    """
    if total <= 0:
        return 1.0
    mixture = lgamma(bad + 1) + lgamma(total - bad + 1) - lgamma(total + 2)
    low, high = bad / total, 1.0
    for _ in range(50):
        rate = (low + high) / 2
        likelihood = (bad * log(rate) if bad else 0.0) + (total - bad) * (log1p(-rate) if rate < 1 else -inf)
        if mixture - likelihood >= -log(alpha):
            high = rate
        else:
            low = rate
    return high

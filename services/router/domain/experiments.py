"""Compare the variants of an experiment. The results are valid however often they are read. Pure.

The interval of the difference of two means is an asymptotic confidence sequence. With probability 1 - alpha
it contains the true difference at all times (Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform
central limit theory and asymptotic confidence sequences", Annals of Statistics 2024, arXiv 2103.06476). With
several metrics, the method of Benjamini and Hochberg limits false discoveries. This method is applied to
e-values (Wang and Ramdas, "False discovery rate control with e-values", JRSS B 2022, arXiv 2009.02824).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, lgamma, log, sqrt

# The parameter rho is chosen so that the interval is as narrow as possible at this many outcomes. Outcomes of
# both variants are counted.
BEST_AT = 5_000
# With fewer outcomes of a variant, the normal approximation does not hold.
MIN_OUTCOMES = 100
# The weight of the prior in the test of the variants' shares, as a number of units (or of requests, if no
# request has a unit).
_PRIOR = 100.0
# The iterations of :func:`best_rho`: enough for the precision of a float, for every alpha up to 0.5.
_STEPS = 40


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of a variant's outcomes of one metric."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> Moments:
        """Return the moments with one more value (Welford, Technometrics 1962)."""
        n = self.n + 1
        delta = value - self.mean
        mean = self.mean + delta / n
        return Moments(n, mean, self.squares + delta * (value - mean))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets of outcomes together (Chan, Golub and LeVeque, 1979)."""
        n = self.n + other.n
        if not n:
            return self
        delta = other.mean - self.mean
        squares = self.squares + other.squares + delta * delta * self.n * other.n / n
        return Moments(n, self.mean + delta * other.n / n, squares)

    @property
    def variance(self) -> float:
        """Return the sample variance; 0 for fewer than two values."""
        return self.squares / (self.n - 1) if self.n > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """The difference between a variant and the control in one metric, and the interval of the difference.

    The interval, ``p_value`` and ``e_value`` are valid at all times. ``lift``: the difference divided by the
    absolute value of the control's mean; None if the mean is 0. ``needed``: how many more outcomes, of both
    variants together, would make this difference significant. It is None if the difference is significant
    already, or if no number is enough. If a variant has fewer than ``MIN_OUTCOMES`` outcomes, ``needed`` is
    the number of outcomes that are missing.
    """

    difference: float
    low: float
    high: float
    lift: float | None
    p_value: float
    e_value: float
    needed: int | None


def best_rho(n: float, alpha: float) -> float:
    """Return the parameter rho that makes the interval as narrow as possible at ``n`` outcomes.

    It solves u = ln(u + 1) - 2 ln(alpha) for u = n rho^2. Each iteration divides the error by about u + 1.
    """
    found = start = -2 * log(alpha)
    for _ in range(_STEPS):
        found = log(found + 1) + start
    return sqrt(found / n)


def radius(n: float, variance: float, alpha: float, rho: float) -> float:
    """Return half the width of the confidence sequence of a mean.

    ``n``: the number of outcomes. ``variance``: the variance of one outcome. ``rho``: see :func:`best_rho`.
    """
    scale = n * rho * rho + 1
    return sqrt(2 * scale / (n * n * rho * rho) * log(sqrt(scale) / alpha) * variance)


def e_value(n: float, difference: float, variance: float, rho: float) -> float:
    """Return the e-value against "no difference"; infinite if it is too large for a float."""
    if variance <= 0:
        return 1.0 if difference == 0 else inf
    scale = n * rho * rho + 1
    exponent = (n * n * rho * rho * difference * difference) / (2 * scale * variance) - log(scale) / 2
    return exp(exponent) if exponent < 700 else inf


def compare(control: Moments, variant: Moments, alpha: float = 0.05, best_at: int = BEST_AT) -> Comparison:
    """Compare a variant with the control. With too few outcomes the interval is infinite."""
    n = control.n + variant.n
    difference = variant.mean - control.mean
    lift = difference / abs(control.mean) if control.mean else None
    if min(control.n, variant.n) < MIN_OUTCOMES:
        short = 2 * MIN_OUTCOMES - min(control.n, MIN_OUTCOMES) - min(variant.n, MIN_OUTCOMES)
        return Comparison(difference, -inf, inf, lift, 1.0, 0.0, short)
    variance = _variance(control, variant)
    rho = best_rho(best_at, alpha)
    half = radius(n, variance, alpha, rho)
    evidence = e_value(n, difference, variance, rho)
    p_value = min(1.0, 1 / evidence) if evidence > 0 else 1.0
    needed = None if abs(difference) > half else _needed(n, abs(difference), variance, alpha, rho)
    return Comparison(difference, difference - half, difference + half, lift, p_value, evidence, needed)


def needed_for(control: Moments, variant: Moments, lift: float, alpha: float = 0.05) -> int | None:
    """Return how many more outcomes, of both variants together, would show a difference of ``lift``.

    ``lift``: the difference as a fraction of the control's mean. Return None if a variant has too few
    outcomes, if the control's mean is 0, or if no number is enough.
    """
    if min(control.n, variant.n) < MIN_OUTCOMES or not control.mean:
        return None
    n, variance = control.n + variant.n, _variance(control, variant)
    return _needed(n, abs(control.mean) * lift, variance, alpha, best_rho(BEST_AT, alpha))


def interval(found: Moments, alpha: float = 0.05, best_at: int = BEST_AT) -> tuple[float, float]:
    """Return the confidence interval of a variant's mean. The interval is valid at all times."""
    if found.n < MIN_OUTCOMES:
        return -inf, inf
    half = radius(found.n, found.variance, alpha, best_rho(best_at, alpha))
    return found.mean - half, found.mean + half


def _variance(control: Moments, variant: Moments) -> float:
    """Return the variance of one outcome's contribution to the difference of the means."""
    n = control.n + variant.n
    return variant.variance * n / variant.n + control.variance * n / control.n


def _needed(n: int, difference: float, variance: float, alpha: float, rho: float) -> int | None:
    """Return how many more outcomes narrow the radius to less than ``difference``; None if no number does."""
    if difference <= 0 or variance <= 0:
        return None
    low, high = 0.0, float(n)
    while radius(high, variance, alpha, rho) >= difference:
        low, high = high, high * 2
        if high > 1e12:
            return None
    while high - low > 1:
        middle = (low + high) / 2
        if radius(middle, variance, alpha, rho) >= difference:
            low = middle
        else:
            high = middle
    return max(0, int(high) + 1 - n)


def significant(e_values: Mapping[str, float], alpha: float = 0.05) -> frozenset[str]:
    """Return the names with significant e-values.

    On average, at most a fraction ``alpha`` of them is wrong.
    """
    ordered = sorted(e_values.items(), key=lambda each: -each[1])
    count = 0
    for rank, (_, value) in enumerate(ordered, 1):
        if rank * value >= len(ordered) / alpha:
            count = rank
    return frozenset(name for name, _ in ordered[:count])


def ratio_e_value(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Return the e-value against the hypothesis that ``counts`` are split by ``weights``.

    A value of 20 or more is a mismatch. The e-value is the Bayes factor of a multinomial with a Dirichlet
    prior around the weights (Lindon and Malek, "Anytime-Valid Inference for Multinomial Count Data", NeurIPS
    2022, arXiv 2011.03567).
    """
    pairs = [(count, weight / sum(weights)) for count, weight in zip(counts, weights, strict=True) if weight]
    if any(count and not weight for count, weight in zip(counts, weights, strict=True)):
        return inf
    total = sum(count for count, _ in pairs)
    logs = lgamma(_PRIOR) - lgamma(_PRIOR + total)
    for count, weight in pairs:
        prior = _PRIOR * weight
        logs += lgamma(prior + count) - lgamma(prior) - count * log(weight)
    return exp(logs) if logs < 700 else inf


def as_json(found: Comparison) -> dict[str, float | int | None]:
    """Return a comparison as JSON values. Infinite numbers become None, because JSON cannot store them."""
    values = {
        "difference": found.difference,
        "low": found.low,
        "high": found.high,
        "lift": found.lift,
        "p_value": found.p_value,
        "e_value": found.e_value,
    }
    finite = {key: None if value is None or not isfinite(value) else value for key, value in values.items()}
    return {**finite, "needed": found.needed}

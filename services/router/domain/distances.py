"""Distances between two histograms with the same bins, and the distances that chance alone causes. Pure.

``p`` is the baseline, ``q`` the window. Both are counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tidegate.kernel.profiles.bins import Bins

Counts = npt.NDArray[Any]

# The number of random draws for a quantile. The 99.9 % quantile of 2,000 draws is the third largest one.
DRAWS = 2000
# For the population stability index (PSI), this share replaces every smaller share. A share of 0 would make
# the PSI infinite.
LEAST_SHARE = 1e-4


@dataclass(frozen=True, slots=True)
class Distances:
    """The distances of a column.

    ``js``: Jensen-Shannon distance, base 2, from 0 to 1. ``ks``: the largest difference of the cumulative
    shares. ``psi``: population stability index. ``wasserstein``: distance in standard deviations of the
    baseline. ``ks`` and ``wasserstein`` are None if the bins have no order.
    """

    psi: float
    js: float
    ks: float | None = None
    wasserstein: float | None = None


def shares(counts: Counts) -> npt.NDArray[np.float64]:
    """Return the share of each bin along the last axis."""
    return np.asarray(counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1), np.float64)


def psi(p: Counts, q: Counts) -> float:
    """Return the population stability index."""
    a, b = np.maximum(shares(p), LEAST_SHARE), np.maximum(shares(q), LEAST_SHARE)
    return float(((b - a) * np.log(b / a)).sum())


def jensen_shannon(p: Counts, q: Counts) -> npt.NDArray[np.float64]:
    """Return the Jensen-Shannon distance along the last axis: the root of the divergence in bits."""
    a, b = shares(p), shares(q)
    middle = (a + b) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(a > 0, a * np.log2(a / middle), 0.0)
        right = np.where(b > 0, b * np.log2(b / middle), 0.0)
    return np.asarray(np.sqrt(np.maximum((left + right).sum(axis=-1) / 2, 0.0)), np.float64)


def kolmogorov_smirnov(p: Counts, q: Counts) -> npt.NDArray[np.float64]:
    """Return the largest difference of the cumulative shares along the last axis."""
    return np.asarray(
        np.abs(np.cumsum(shares(p), axis=-1) - np.cumsum(shares(q), axis=-1)).max(axis=-1), np.float64
    )


def wasserstein(p: Counts, q: Counts, bins: Bins, sd: float | None) -> float | None:
    """Return the Wasserstein distance in standard deviations. All values of a bin are put at its middle."""
    if not sd or not bins.cuts:
        return None
    edges = np.array([min(bins.low, bins.cuts[0]), *bins.cuts, max(bins.high, bins.cuts[-1])])
    steps = np.diff((edges[1:] + edges[:-1]) / 2)
    apart = np.abs(np.cumsum(shares(p)) - np.cumsum(shares(q)))[:-1]
    return float((apart * steps).sum() / sd)


def null_quantiles(p: Counts, q: Counts, quantile: float) -> tuple[float, float]:
    """Return a quantile of the distances js and ks between two samples of the same distribution.

    It is estimated by a parametric bootstrap: both samples are drawn from the pooled shares, with the sizes
    of ``p`` and ``q`` (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 16).
    """
    pooled = shares(p.astype(np.float64) + q)
    return _null_quantiles(tuple(np.round(pooled, 4).tolist()), int(p.sum()), int(q.sum()), quantile)


@lru_cache(maxsize=1024)
def _null_quantiles(pooled: tuple[float, ...], n: int, m: int, quantile: float) -> tuple[float, float]:
    # A fixed seed, so the same counts always get the same verdict.
    random = np.random.default_rng(0)
    probabilities = np.asarray(pooled) / sum(pooled)
    a, b = random.multinomial(n, probabilities, DRAWS), random.multinomial(m, probabilities, DRAWS)
    return (
        float(np.quantile(jensen_shannon(a, b), quantile)),
        float(np.quantile(kolmogorov_smirnov(a, b), quantile)),
    )

"""Bins of a column, computed from values or from summaries of several replicas. Pure.

A bin contains the values above the previous cut, up to its own cut. Cuts are quantiles, so each bin has about
the same share of the baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tidegate.kernel.profiles.columns import Columns, Numbers

BINS = 32
# The number of quantiles in a summary. Cuts can be computed from summaries. With this many quantiles, such a
# cut is misplaced by less than 1 % of the rows.
POINTS = 257
# Probabilities have fixed bins, because the estimate of the accuracy needs them.
FIXED = ("confidence", "score")
FIXED_CUTS = tuple(round(at / 50, 2) for at in range(1, 50))


@dataclass(frozen=True, slots=True)
class Bins:
    """The inner cuts of a column's bins in rising order, and the range of the baseline's values."""

    cuts: tuple[float, ...]
    low: float
    high: float

    def to_json(self) -> list[Any]:
        """Return the bins as JSON values."""
        return [list(self.cuts), self.low, self.high]

    @classmethod
    def from_json(cls, found: Sequence[Any]) -> Bins:
        """Read the result of :meth:`to_json`. Raise ValueError if the cuts are too many or do not rise."""
        cuts, low, high = found
        read = tuple(float(cut) for cut in cuts)
        if len(read) > 255 or list(read) != sorted(set(read)):
            raise ValueError("a column's bins have more than 255 cuts, or the cuts do not rise")
        return cls(read, float(low), float(high))


FIXED_BINS = Bins(FIXED_CUTS, 0.0, 1.0)


def bins_from_json(found: Mapping[str, Sequence[Any]]) -> dict[str, Bins]:
    """Read the bins of each column from JSON values.

    Raise ValueError if the cuts of a column are too many or do not rise.
    """
    return {str(name): Bins.from_json(each) for name, each in found.items()}


@dataclass(frozen=True, slots=True)
class Summary:
    """The quantiles of some values of a column, and the number of values. No row can be rebuilt from them."""

    rows: int
    points: tuple[float, ...]


def learn(values: Numbers) -> Bins:
    """Return the bins of a column from its values. Without a finite value there is one bin."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Bins((), 0.0, 0.0)
    shares = np.arange(1, BINS) / BINS
    cuts = np.unique(np.quantile(finite, shares, method="inverted_cdf"))
    return Bins(tuple(cuts.tolist()), float(finite.min()), float(finite.max()))


def summarize(values: Numbers) -> Summary:
    """Return a column's summary."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return Summary(0, ())
    points = np.quantile(finite, np.linspace(0, 1, POINTS), method="inverted_cdf")
    return Summary(len(finite), tuple(points.tolist()))


def learn_from_summaries(summaries: Sequence[Summary]) -> Bins:
    """Return the bins of a column from the summaries of several replicas."""
    found = [each for each in summaries if each.rows]
    if not found:
        return Bins((), 0.0, 0.0)
    points = np.concatenate([np.asarray(each.points) for each in found])
    weights = np.concatenate([np.full(len(each.points), each.rows / len(each.points)) for each in found])
    order = np.argsort(points, kind="stable")
    points, reached = points[order], np.cumsum(weights[order])
    shares = np.arange(1, BINS) / BINS * reached[-1]
    cuts = np.unique(points[np.minimum(np.searchsorted(reached, shares), len(points) - 1)])
    return Bins(tuple(cuts.tolist()), float(points[0]), float(points[-1]))


def learn_all(columns: Columns) -> dict[str, Bins]:
    """Return the bins of all columns of numbers."""
    return {name: FIXED_BINS if name in FIXED else learn(values) for name, values in columns.numbers.items()}


def count(values: Numbers, bins: Bins) -> npt.NDArray[np.int64]:
    """Return how many of ``values`` are in each bin. All values must be finite."""
    found = np.searchsorted(np.asarray(bins.cuts), values, side="left")
    return np.bincount(found, minlength=len(bins.cuts) + 1).astype(np.int64)

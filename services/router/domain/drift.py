"""Compare a window of sampled rows with a baseline, and decide which columns have drifted. Pure.

Two distances are computed for each column, and each distance has a limit. A column is above its limit if at
least one distance is too large. The Jensen-Shannon distance finds changes of shape. The Kolmogorov-Smirnov
distance also finds small shifts that the other distance misses (see ``tests/unit/router/test_drift.py``). In
small windows, fixed limits would raise false alarms. So a limit is never below the distance that chance alone
causes in 1 of 1,000 windows of that size. A column has drifted if it was above its limit in two windows in a
row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from services.router.domain.distances import (
    Counts,
    Distances,
    jensen_shannon,
    kolmogorov_smirnov,
    null_quantiles,
    psi,
    wasserstein,
)
from tidegate.kernel.profiles.bins import Bins
from tidegate.kernel.profiles.profile import NumberCounts, Profile, ValueCounts

ColumnState = Literal["steady", "suspect", "drifted", "unknown"]
MISSING, OTHER = "missing", "other"
# The largest number of values of a string column that are compared one by one. All other values are counted
# as one value.
VALUES_COMPARED = 31


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """The settings for a verdict on drift.

    ``min_rows``: the fewest rows of a window and of its baseline. ``js``, ``ks``: the lowest limits of the
    distances. ``quantile``: a limit is never below this quantile of the distances that chance alone causes.
    """

    min_rows: int = 3000
    js: float = 0.1
    ks: float = 0.06
    quantile: float = 0.999


@dataclass(frozen=True, slots=True)
class ColumnDrift:
    """The verdict on a column, with its distances and the limits that applied."""

    state: ColumnState
    distances: Distances | None = None
    js_limit: float = 0.0
    ks_limit: float = 0.0
    missing: float = 0.0
    outside: float = 0.0
    mean: tuple[float | None, float | None] = (None, None)

    @property
    def score(self) -> float:
        """Return the larger of two ratios: ``js`` to its limit, and ``ks`` to its limit.

        At 1 or more, the column is above its limit.
        """
        if self.distances is None:
            return 0.0
        return max(self.distances.js / self.js_limit, (self.distances.ks or 0.0) / self.ks_limit)

    def to_json(self) -> dict[str, Any]:
        """Return the verdict for JSON."""
        found: dict[str, Any] = {"state": self.state}
        if self.distances is None:
            return found
        distances = self.distances
        return found | {
            "score": round(self.score, 4),
            "js": round(distances.js, 4),
            "ks": _rounded(distances.ks),
            "psi": round(distances.psi, 4),
            "wasserstein": _rounded(distances.wasserstein),
            "js_limit": round(self.js_limit, 4),
            "ks_limit": round(self.ks_limit, 4),
            "missing": round(self.missing, 6),
            "outside": round(self.outside, 6),
            "mean": self.mean[1],
            "baseline_mean": self.mean[0],
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing a window with a baseline.

    ``reason``: why there is no verdict; empty if there is one.
    """

    state: ColumnState
    columns: dict[str, ColumnDrift] = field(default_factory=dict)
    reason: str = ""

    @property
    def above(self) -> frozenset[str]:
        """Return the columns above their limits."""
        return frozenset(name for name, each in self.columns.items() if each.state in ("suspect", "drifted"))

    @property
    def drifted(self) -> list[str]:
        """Return the columns that have drifted, largest score first."""
        return [name for name in self.ranked if self.columns[name].state == "drifted"]

    @property
    def ranked(self) -> list[str]:
        """Return the names of all columns, largest score first."""
        return sorted(self.columns, key=lambda name: (-self.columns[name].score, name))


def compare(
    baseline: Profile,
    window: Profile,
    bins: Mapping[str, Bins],
    above_before: Collection[str],
    policy: DriftPolicy,
) -> Comparison:
    """Compare a window with a baseline.

    ``above_before``: the columns that were above their limits in the window before.
    """
    if window.rows < policy.min_rows:
        return Comparison("unknown", reason=f"the window has {window.rows} of {policy.min_rows} rows")
    columns: dict[str, ColumnDrift] = {}
    for name, numbers in window.numbers.items():
        if (held := baseline.numbers.get(name)) is not None and name in bins:
            columns[name] = _compare_numbers(held, numbers, bins[name], policy, name in above_before)
    for name, values in window.values.items():
        if (known := baseline.values.get(name)) is not None:
            columns[name] = _compare_values(known, values, policy, name in above_before)
    states = {each.state for each in columns.values()}
    state: ColumnState = next((s for s in _WORST_FIRST if s in states), "unknown")
    return Comparison(state, columns, "" if columns else "window and baseline have no common column")


_WORST_FIRST: tuple[ColumnState, ...] = ("drifted", "suspect", "steady")


def _compare_numbers(
    baseline: NumberCounts, window: NumberCounts, bins: Bins, policy: DriftPolicy, was_above: bool
) -> ColumnDrift:
    # Count missing values as one more bin, so that a change of their share is found as drift.
    p = np.append(baseline.counts, baseline.missing)
    q = np.append(window.counts, window.missing)
    if len(p) != len(q) or not p.sum() or not q.sum():
        return ColumnDrift("unknown")
    found = Distances(
        psi(p, q),
        float(jensen_shannon(p, q)),
        float(kolmogorov_smirnov(p, q)),
        wasserstein(baseline.counts, window.counts, bins, baseline.sd),
    )
    total = int(q.sum())
    return _judged(
        found,
        p,
        q,
        policy,
        was_above,
        missing=window.missing / total,
        outside=(window.below + window.above) / total,
        mean=(baseline.mean, window.mean),
    )


def _compare_values(
    baseline: ValueCounts, window: ValueCounts, policy: DriftPolicy, was_above: bool
) -> ColumnDrift:
    p, q = aligned(baseline, window)
    if not p.sum() or not q.sum():
        return ColumnDrift("unknown")
    found = Distances(psi(p, q), float(jensen_shannon(p, q)))
    return _judged(found, p, q, policy, was_above, missing=window.missing / int(q.sum()))


def aligned(baseline: ValueCounts, window: ValueCounts) -> tuple[Counts, Counts]:
    """Return the counts of baseline and window in the same bins.

    The bins are the baseline's most frequent values, all other values, and missing values.
    """
    names = sorted(baseline.counts, key=lambda name: (-baseline.counts[name], name))[:VALUES_COMPARED]
    pair = []
    for each in (baseline, window):
        named = [each.counts.get(name, 0) for name in names]
        pair.append(np.array([*named, each.n - sum(named), each.missing]))
    return pair[0], pair[1]


def _judged(
    found: Distances, p: Counts, q: Counts, policy: DriftPolicy, was_above: bool, **facts: Any
) -> ColumnDrift:
    js_limit, ks_limit = policy.js, policy.ks
    if found.js >= js_limit or (found.ks or 0.0) >= ks_limit:
        # The bootstrap takes milliseconds, so run it only for a column above the lowest limits.
        js_null, ks_null = null_quantiles(p, q, policy.quantile)
        js_limit, ks_limit = max(js_limit, js_null), max(ks_limit, ks_null)
    above = found.js >= js_limit or (found.ks or 0.0) >= ks_limit
    state: ColumnState = ("drifted" if was_above else "suspect") if above else "steady"
    return ColumnDrift(state, found, js_limit, ks_limit, **facts)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

"""Counts of sampled rows by column. Profiles with the same bins can be added up. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tidegate.kernel.profiles.bins import Bins, count
from tidegate.kernel.profiles.columns import Columns, Numbers

# How many values of a string column have a count of their own. All rarer values are counted together.
VALUES_KEPT = 256


@dataclass(slots=True)
class NumberCounts:
    """A column of numbers: counts by bin, missing values, and values outside the baseline's range."""

    counts: npt.NDArray[np.int64]
    missing: int = 0
    below: int = 0
    above: int = 0
    total: float = 0.0
    squares: float = 0.0
    least: float = math.inf
    most: float = -math.inf

    @property
    def n(self) -> int:
        """Return the number of finite values."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float | None:
        """Return the mean of the finite values; None without finite values."""
        return self.total / self.n if self.n else None

    @property
    def sd(self) -> float | None:
        """Return the standard deviation of the finite values.

        Return None if there are no finite values, or if the result is not finite.
        """
        if not self.n:
            return None
        mean = self.total / self.n
        variance = self.squares / self.n - mean * mean
        return math.sqrt(max(0.0, variance)) if math.isfinite(variance) else None

    def add(self, other: NumberCounts) -> None:
        """Add the counts of ``other``, which must have the same bins.

        Raise ValueError if its number of bins differs. The cuts of the bins are not compared.
        """
        if len(other.counts) != len(self.counts):
            raise ValueError("profiles with different bins cannot be added up")
        self.counts = self.counts + other.counts
        self.missing += other.missing
        self.below += other.below
        self.above += other.above
        self.total += other.total
        self.squares += other.squares
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)

    def to_json(self) -> list[Any]:
        """Return the counts as JSON values."""
        ends = [self.least, self.most] if self.n else [None, None]
        return [
            self.counts.tolist(),
            self.missing,
            self.below,
            self.above,
            _finite(self.total),
            _finite(self.squares),
            *ends,
        ]

    @classmethod
    def from_json(cls, found: list[Any]) -> NumberCounts:
        """Read the result of :meth:`to_json`. Raise ValueError or TypeError for anything else."""
        counts, missing, below, above, total, squares, least, most = found
        return cls(
            np.asarray(counts, np.int64),
            int(missing),
            int(below),
            int(above),
            float(total),
            float(squares),
            math.inf if least is None else float(least),
            -math.inf if most is None else float(most),
        )


@dataclass(slots=True)
class ValueCounts:
    """A column of short strings: counts of its most frequent values, other values, and missing values."""

    counts: dict[str, int] = field(default_factory=dict)
    other: int = 0
    missing: int = 0

    @property
    def n(self) -> int:
        """Return the number of values that are not missing."""
        return sum(self.counts.values()) + self.other

    def add(self, other: ValueCounts) -> None:
        """Add the counts of another part of the same column.

        If there are then more than ``VALUES_KEPT`` different values, the rarest are counted in the attribute
        ``other``.
        """
        found = Counter(self.counts)
        found.update(other.counts)
        kept = dict(found.most_common(VALUES_KEPT))
        self.other += other.other + found.total() - sum(kept.values())
        self.counts = kept
        self.missing += other.missing

    def to_json(self) -> list[Any]:
        """Return the counts as JSON values."""
        return [self.counts, self.other, self.missing]

    @classmethod
    def from_json(cls, found: list[Any]) -> ValueCounts:
        """Read the result of :meth:`to_json`. Raise ValueError or TypeError for anything else."""
        counts, other, missing = found
        return cls({str(k): int(v) for k, v in counts.items()}, int(other), int(missing))


@dataclass(slots=True)
class Profile:
    """The counts of the values in sampled rows, for each column."""

    rows: int = 0
    numbers: dict[str, NumberCounts] = field(default_factory=dict)
    values: dict[str, ValueCounts] = field(default_factory=dict)

    def count(self, columns: Columns, bins: Mapping[str, Bins]) -> None:
        """Count some rows. Columns of numbers without bins are left out."""
        self.rows += columns.rows
        for name, numbers in columns.numbers.items():
            if name in bins:
                _merge(self.numbers, name, count_numbers(numbers, bins[name]))
        for name, values in columns.values.items():
            found = Counter(each for each in values if each is not None)
            kept = dict(found.most_common(VALUES_KEPT))
            rest = found.total() - sum(kept.values())
            _merge(self.values, name, ValueCounts(kept, rest, len(values) - found.total()))

    def add(self, other: Profile) -> None:
        """Add another profile, which must have the same bins.

        Raise ValueError if a column's number of bins differs. The cuts of the bins are not compared.
        """
        for name, numbers in other.numbers.items():
            _merge(self.numbers, name, numbers)
        for name, values in other.values.items():
            _merge(self.values, name, values)
        self.rows += other.rows

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON values."""
        return {
            "rows": self.rows,
            "numbers": {name: each.to_json() for name, each in self.numbers.items()},
            "values": {name: each.to_json() for name, each in self.values.items()},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Profile:
        """Read the result of :meth:`to_json`.

        Raise KeyError, ValueError or TypeError for anything else.
        """
        return cls(
            int(found["rows"]),
            {str(name): NumberCounts.from_json(each) for name, each in found["numbers"].items()},
            {str(name): ValueCounts.from_json(each) for name, each in found["values"].items()},
        )


def count_numbers(numbers: Numbers, bins: Bins) -> NumberCounts:
    """Return the counts of a column of numbers. NaN and infinite values are counted as missing."""
    finite = numbers[np.isfinite(numbers)]
    missing = len(numbers) - len(finite)
    if not len(finite):
        return NumberCounts(np.zeros(len(bins.cuts) + 1, np.int64), missing)
    with np.errstate(over="ignore"):
        total, squares = float(finite.sum()), float((finite * finite).sum())
    return NumberCounts(
        count(finite, bins),
        missing,
        int((finite < bins.low).sum()),
        int((finite > bins.high).sum()),
        total,
        squares,
        float(finite.min()),
        float(finite.max()),
    )


def _merge(into: dict[str, Any], name: str, found: Any) -> None:
    if name in into:
        into[name].add(found)
    else:
        into[name] = found


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0

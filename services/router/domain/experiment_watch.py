"""Count the outcomes of one experiment: feedback by metric, and the gateways' answers and failures. Pure.

Outcomes of one unit, for example of one user, are correlated. So the outcomes are added up in buckets of
units. The variance of a mean is computed from the buckets' sums (the delta method for a ratio of two sums).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

from services.router.domain.experiments import MIN_OUTCOMES, Moments
from tidegate.kernel.protocol.experiments import Experiment, ExperimentMetric
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.latency_buckets import COUNT, upper_s
from tidegate.kernel.protocol.presence import GatewayReport, VariantCounts

BUCKETS = 1024
# A comparison needs units in at least this many buckets. With fewer buckets, the variance between units is
# too uncertain.
MIN_UNITS = 50
# The check of the variants' shares uses a sample of at most this many units. The hash of a unit decides if
# the unit is in the sample.
UNITS_KEPT = 4096
# The history has at most this many points. When it has more, every second point is dropped.
POINTS_KEPT = 240
POINT_S = 5.0


@dataclass(slots=True)
class Outcomes:
    """The outcomes of one variant in one metric.

    ``alone``: the outcomes without a unit. ``units``: the outcomes with a unit. ``buckets``: the number and
    the sum of the outcomes with a unit, by bucket of units.
    """

    alone: Moments = field(default_factory=Moments)
    units: Moments = field(default_factory=Moments)
    buckets: dict[int, tuple[int, float]] = field(default_factory=dict)

    def add(self, value: float, unit: str) -> None:
        """Add one outcome."""
        if not unit:
            self.alone = self.alone.add(value)
            return
        self.units = self.units.add(value)
        bucket = int(unit, 16) % BUCKETS
        n, total = self.buckets.get(bucket, (0, 0.0))
        self.buckets[bucket] = n + 1, total + value

    def moments(self) -> Moments:
        """Return the count, the mean and the variance of the outcomes.

        The variance takes into account that outcomes of one unit are correlated.
        """
        found = self.alone.merge(self.units)
        number = len(self.buckets)
        if number < 2:
            return found
        between = sum((total - n * found.mean) ** 2 for n, total in self.buckets.values())
        between *= number / (number - 1)
        single = self.alone.squares + self.alone.n * (self.alone.mean - found.mean) ** 2
        variance = max((between + single) / found.n, found.variance)
        return Moments(found.n, found.mean, variance * (found.n - 1))

    @property
    def enough_units(self) -> bool:
        """Return True if there are enough different units for a comparison.

        This is also True if no outcome has a unit, or if at least ``MIN_OUTCOMES`` outcomes have no unit.
        """
        return not self.buckets or self.alone.n >= MIN_OUTCOMES or len(self.buckets) >= MIN_UNITS


@dataclass(frozen=True, slots=True)
class ExperimentPoint:
    """A point for a chart: each treatment's difference from the control, with its interval.

    ``differences``: the difference, and the low and high ends of its interval, by metric and treatment.
    """

    at: float
    differences: dict[str, dict[str, tuple[float | None, float | None, float | None]]]


@dataclass(slots=True)
class ExperimentWatch:
    """The counts of one experiment. ``outcomes``: by variant and metric. ``answers``: by variant.

    ``seen``: the last totals of each gateway. ``begun``: True if the totals at the start of the experiment
    were stored in ``seen``, so that earlier requests are not counted. ``units``: the sampled units, each with
    the index of its variant. ``depth``: a unit is sampled if this number of bits of its hash are 0. ``late``:
    True if some feedback was lost before the router read it.
    """

    id: str
    outcomes: dict[str, dict[str, Outcomes]] = field(default_factory=dict)
    answers: dict[str, VariantCounts] = field(default_factory=dict)
    seen: dict[str, VariantCounts] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    depth: int = 0
    late: bool = False
    points: list[ExperimentPoint] = field(default_factory=list)
    point_s: float = POINT_S
    begun: bool = False

    def take(self, experiment: Experiment, record: FeedbackRecord) -> bool:
        """Count a feedback record. Return False if it is not an outcome of this experiment."""
        if record.experiment != self.id or record.deployment not in experiment.variants:
            return False
        used = False
        for metric in experiment.options.metrics:
            value = value_of(metric, record)
            if value is not None:
                by_metric = self.outcomes.setdefault(record.deployment, {})
                by_metric.setdefault(metric.name, Outcomes()).add(value, record.unit)
                used = True
        if record.unit:
            self._sample(record.unit, experiment.variants.index(record.deployment))
        return used

    def begin(self, endpoint: str, reports: Iterable[GatewayReport]) -> None:
        """Remember the gateways' totals at the start, so that earlier requests are not counted."""
        for report in reports:
            for name, total in report.traffic.get(endpoint, {}).items():
                self.seen[f"{report.incarnation} {name}"] = total
        self.begun = True

    def count(self, endpoint: str, reports: Iterable[GatewayReport]) -> bool:
        """Add the gateways' answers and failures since the last call. Return True if a count changed."""
        changed = False
        for report in reports:
            for name, total in report.traffic.get(endpoint, {}).items():
                key = f"{report.incarnation} {name}"
                before = self.seen.get(key)
                if before == total:
                    continue
                self.seen[key], changed = total, True
                into = self.answers.setdefault(name, VariantCounts(0, [0] * COUNT))
                _add_new(into, before, total)
        return changed

    def outcomes_of(self, variant: str, metric: ExperimentMetric) -> Moments:
        """Return count, mean and variance of the outcomes of one variant in one metric."""
        if metric.measured:
            counts = self.answers.get(variant)
            if counts is None:
                return Moments()
            return errors_of(counts) if metric.kind == "errors" else latency_of(counts)
        found = self.outcomes.get(variant, {}).get(metric.name)
        return Moments() if found is None else found.moments()

    def enough_units(self, variant: str, metric: ExperimentMetric) -> bool:
        """Return True if a variant has enough different units in this metric, or no outcomes yet."""
        found = self.outcomes.get(variant, {}).get(metric.name)
        return found is None or found.enough_units

    def requests_of(self, variant: str) -> int:
        """Return the number of requests that the gateways counted for a variant."""
        counts = self.answers.get(variant)
        return 0 if counts is None else sum(counts.times) + counts.failed

    def due(self, now: float) -> bool:
        """Return True if it is time for the next point of the chart."""
        return not self.points or now - self.points[-1].at >= self.point_s

    def note(self, point: ExperimentPoint) -> None:
        """Add a point to the chart. If the chart then has too many points, drop every second one."""
        self.points.append(point)
        if len(self.points) > POINTS_KEPT:
            self.points = self.points[::2]
            self.point_s *= 2

    def _sample(self, unit: str, variant: int) -> None:
        number = int(unit, 16) >> 16  # do not use the bits that choose the bucket
        if number & ((1 << self.depth) - 1):
            return
        self.units.setdefault(unit, variant)
        while len(self.units) > UNITS_KEPT:
            self.depth += 1
            mask = (1 << self.depth) - 1
            self.units = {key: at for key, at in self.units.items() if not (int(key, 16) >> 16) & mask}

    def to_json(self) -> dict[str, Any]:
        """Return the counts as a document."""
        return {
            "id": self.id,
            "outcomes": {
                variant: {metric: _outcomes_json(each) for metric, each in metrics.items()}
                for variant, metrics in self.outcomes.items()
            },
            "answers": {name: [each.failed, each.times] for name, each in self.answers.items()},
            "seen": {name: [each.failed, each.times] for name, each in self.seen.items()},
            "units": self.units,
            "depth": self.depth,
            "late": self.late,
            "points": [[point.at, point.differences] for point in self.points],
            "point_s": self.point_s,
            "begun": self.begun,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ExperimentWatch:
        """Read the result of :meth:`to_json`.

        Raise KeyError, TypeError or ValueError if ``document`` cannot be read.
        """
        return cls(
            document["id"],
            {
                variant: {metric: _outcomes_from(each) for metric, each in metrics.items()}
                for variant, metrics in document["outcomes"].items()
            },
            {name: VariantCounts(*each) for name, each in document["answers"].items()},
            {name: VariantCounts(*each) for name, each in document["seen"].items()},
            document["units"],
            document["depth"],
            document["late"],
            [ExperimentPoint(*each) for each in document["points"]],
            document["point_s"],
            document.get("begun", True),
        )


def value_of(metric: ExperimentMetric, record: FeedbackRecord) -> float | None:
    """Return a record's value for a metric; None if the record has no value for this metric."""
    if metric.measured or record.metric != metric.source:
        return None
    if metric.kind == "rate":
        return None if record.label is None else float(record.label == metric.label)
    return record.value


def errors_of(counts: VariantCounts) -> Moments:
    """Return the moments of the failures. A failed request has the value 1, an answered one 0."""
    n = sum(counts.times) + counts.failed
    if not n:
        return Moments()
    mean = counts.failed / n
    return Moments(n, mean, n * mean * (1 - mean))


def latency_of(counts: VariantCounts) -> Moments:
    """Return the moments of the latencies in ms. Each latency is taken as the middle of its bucket."""
    n = sum(counts.times)
    if not n:
        return Moments()
    middles = [1e3 * sqrt(upper_s(max(at - 1, 0)) * upper_s(at)) for at in range(len(counts.times))]
    mean = sum(k * middle for k, middle in zip(counts.times, middles, strict=True)) / n
    squares = sum(k * (middle - mean) ** 2 for k, middle in zip(counts.times, middles, strict=True))
    return Moments(n, mean, squares)


def _add_new(into: VariantCounts, before: VariantCounts | None, total: VariantCounts) -> None:
    """Add to ``into`` how much the counts grew from ``before`` to ``total``.

    If ``total`` is smaller than ``before``, the gateway's counts began again at 0. Then add all of ``total``.
    """
    if before is not None and (sum(total.times) < sum(before.times) or total.failed < before.failed):
        before = None
    old = before or VariantCounts(0, [0] * COUNT)
    into.failed += total.failed - old.failed
    into.times = [a + b - c for a, b, c in zip(into.times, total.times, old.times, strict=True)]


def _outcomes_json(found: Outcomes) -> list[Any]:
    alone, units = found.alone, found.units
    return [
        [alone.n, alone.mean, alone.squares],
        [units.n, units.mean, units.squares],
        [[bucket, *sums] for bucket, sums in found.buckets.items()],
    ]


def _outcomes_from(document: list[Any]) -> Outcomes:
    alone, units, buckets = document
    return Outcomes(Moments(*alone), Moments(*units), {at: (n, total) for at, n, total in buckets})

"""Prometheus metrics of drift: a few series for each version."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Gauge

from services.router.domain.drift import Comparison

SCORE = Gauge(
    "tidegate_drift_score",
    "Largest distance of a column from the baseline, in parts of its limit; 1 or more is above the limit.",
    ["model", "version"],
)
DRIFTED = Gauge("tidegate_drifted_columns", "Columns that have drifted.", ["model", "version"])
COLUMN = Gauge(
    "tidegate_drift_column_score",
    "Distances of the three columns that are furthest from the baseline, in parts of their limits.",
    ["model", "version", "column"],
)
TOP = 3


class DriftMetrics:
    """Shows the last verdict on each version."""

    def show(self, comparisons: Mapping[tuple[str, int], Comparison | None]) -> None:
        """Show these verdicts, and no others."""
        for gauge in (SCORE, DRIFTED, COLUMN):
            gauge.clear()
        for (model, number), found in comparisons.items():
            if found is None or not found.columns:
                continue
            version = str(number)
            top = found.ranked[:TOP]
            SCORE.labels(model, version).set(found.columns[top[0]].score)
            DRIFTED.labels(model, version).set(len(found.drifted))
            for name in top:
                COLUMN.labels(model, version, name).set(found.columns[name].score)

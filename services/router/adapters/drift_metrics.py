"""Prometheus metrics of drift and quality: a few series for each version."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Gauge

from services.router.domain.drift import Comparison
from services.router.domain.quality_history import QualityHistory

SCORE = Gauge(
    "tidegate_drift_score",
    "Largest distance of a column from the baseline, divided by its limit. 1 or more is above the limit.",
    ["model", "version"],
)
DRIFTED = Gauge("tidegate_drifted_columns", "Columns that have drifted.", ["model", "version"])
COLUMN = Gauge(
    "tidegate_drift_column_score",
    "Distances of the three columns that are furthest from the baseline, divided by their limits.",
    ["model", "version", "column"],
)
QUALITY = Gauge(
    "tidegate_quality",
    "A measure of the last window with labels: accuracy, auc, ece, mae or rmse.",
    ["model", "version", "measure"],
)
ESTIMATED = Gauge(
    "tidegate_estimated_accuracy",
    "Accuracy of the last window, estimated from the model's own probabilities, without labels.",
    ["model", "version"],
)
TOP = 3


class QualityMetrics:
    """Sets the gauges of quality: the measures of each version's last window, and the estimated accuracy."""

    def show(self, histories: Mapping[tuple[str, int], QualityHistory]) -> None:
        """Set the gauges of the versions in ``histories``, and remove the gauges of all other versions."""
        QUALITY.clear()
        ESTIMATED.clear()
        for (model, number), history in histories.items():
            version = str(number)
            for measure, value in (history.points[-1].measures if history.points else {}).items():
                QUALITY.labels(model, version, measure).set(value)
            if history.estimates:
                ESTIMATED.labels(model, version).set(history.estimates[-1]["accuracy"])


class DriftMetrics:
    """Sets the gauges of drift: the last verdict on each version."""

    def show(self, comparisons: Mapping[tuple[str, int], Comparison | None]) -> None:
        """Set the gauges of the versions in ``comparisons``, and remove all other gauges.

        A version whose comparison is None has no verdict yet, and gets no gauges.
        """
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

"""Counting the outcomes of an experiment, and its report."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
import pytest

from services.router.domain.experiment_report import complete, point_of, report, sample_ratio
from services.router.domain.experiment_watch import (
    UNITS_KEPT,
    ExperimentPoint,
    ExperimentWatch,
    Outcomes,
    errors_of,
    latency_of,
)
from services.router.domain.experiments import Moments, compare
from tidegate.kernel.protocol.experiments import Experiment, ExperimentMetric, ExperimentOptions
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.latency_buckets import COUNT, buckets_of
from tidegate.kernel.protocol.presence import GatewayReport, VariantCounts

pytestmark = pytest.mark.unit

METRICS = [
    ExperimentMetric(name="score"),
    ExperimentMetric(name="good", kind="rate", label="good"),
    ExperimentMetric(name="errors", kind="errors", goal="down"),
    ExperimentMetric(name="latency", kind="latency", goal="down"),
]


def experiment(**options: Any) -> Experiment:
    return Experiment(
        treatments=["v2"], control="v1", id="x1", options=ExperimentOptions(metrics=METRICS, **options)
    )


def record(deployment: str, value: float | None = None, **given: Any) -> FeedbackRecord:
    base = FeedbackRecord("digits", deployment, "1", "r", "score", value, None, 0, 0, experiment="x1")
    return replace(base, **given)


def gateway(failed: int, times: list[float], incarnation: str = "g1", variant: str = "v1") -> GatewayReport:
    counts = VariantCounts(failed, buckets_of(np.array(times)).tolist() if times else [0] * COUNT)
    return GatewayReport(incarnation, 0.0, {}, {"digits": {variant: counts}})


def unit(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}"


def test_only_outcomes_of_the_experiment_count():
    watch = ExperimentWatch("x1")
    assert watch.take(experiment(), record("v1", 1.0))
    assert not watch.take(experiment(), record("v1", 1.0, experiment="x0"))
    assert not watch.take(experiment(), record("v1", 1.0, experiment=""))
    assert not watch.take(experiment(), record("v3", 1.0))
    assert not watch.take(experiment(), record("v1", 1.0, metric="other"))
    assert watch.outcomes_of("v1", METRICS[0]) == Moments(1, 1.0, 0.0)


def test_the_rate_of_a_label():
    watch = ExperimentWatch("x1")
    for label in ("good", "bad", "good", "good"):
        watch.take(experiment(), record("v2", None, metric="label", label=label))
    assert watch.outcomes_of("v2", METRICS[1]).mean == 0.75
    assert watch.outcomes_of("v2", METRICS[0]).n == 0


def test_the_gateways_counts_are_added_once():
    watch = ExperimentWatch("x1")
    assert watch.count("digits", [gateway(1, [0.01] * 3)])
    assert not watch.count("digits", [gateway(1, [0.01] * 3)])
    assert watch.count("digits", [gateway(2, [0.01] * 5), gateway(1, [0.1], "g2")])
    assert watch.requests_of("v1") == 9
    assert watch.outcomes_of("v1", METRICS[2]).mean == pytest.approx(3 / 9)
    watch.count("digits", [gateway(0, [0.01])])
    assert watch.requests_of("v1") == 10, "a smaller total began again"


def test_moments_of_counts():
    times = np.random.default_rng(1).lognormal(-4, 0.5, 5000)
    found = latency_of(VariantCounts(0, buckets_of(times).tolist()))
    assert found.mean == pytest.approx(1e3 * times.mean(), rel=0.02)
    assert found.variance == pytest.approx(1e6 * times.var(), rel=0.05)
    errors = errors_of(VariantCounts(10, [0] * 159 + [90]))
    assert (errors.n, errors.mean) == (100, 0.1)
    assert errors.variance == pytest.approx(0.09, rel=0.02)
    assert errors_of(VariantCounts(0, [0] * COUNT)) == latency_of(VariantCounts(0, [0] * COUNT)) == Moments()


def test_outcomes_without_units_have_the_plain_variance():
    values, found = np.random.default_rng(2).normal(size=500), Outcomes()
    for value in values:
        found.add(float(value), "")
    assert found.moments().variance == pytest.approx(values.var(ddof=1))


def false_alarms(runs: int, *, known: bool) -> int:
    """Return in how many A/A experiments a difference appears, if each user reports 20 similar outcomes.

    ``known``: the outcomes have the user's unit.
    """
    rng, found = np.random.default_rng(11), 0
    for _ in range(runs):
        sides = Outcomes(), Outcomes()
        for user in range(600):
            side, level, name = sides[rng.random() < 0.5], rng.normal(), unit(int(rng.integers(2**63)))
            for value in rng.normal(level, 0.3, 20):
                side.add(float(value), name if known else "")
            if user % 60 == 59 and user > 200:
                result = compare(sides[0].moments(), sides[1].moments())
                if result.low > 0 or result.high < 0:
                    found += 1
                    break
    return found


def test_similar_outcomes_of_a_user_are_no_evidence():
    """Without the units, most experiments without a difference would find one."""
    runs = 40
    assert false_alarms(runs, known=True) <= 0.05 * runs
    assert false_alarms(runs, known=False) >= 0.5 * runs


def test_few_units_are_not_enough():
    watch, rng = ExperimentWatch("x1"), np.random.default_rng(1)
    for at in range(2000):
        name = ("v1", "v2")[at % 2]
        watch.take(experiment(), record(name, float(rng.normal(at % 2)), unit=unit(at % 10)))
    shown = report("digits", experiment(), watch)
    comparison = shown["metrics"][0]["variants"][1]["comparison"]
    assert (comparison["low"], comparison["verdict"]) == (None, "open")
    assert "too few units" in shown["summary"]


def filled(lift: float = 0.0, number: int = 3000) -> ExperimentWatch:
    watch, rng = ExperimentWatch("x1"), np.random.default_rng(4)
    for at in range(number):
        name = ("v1", "v2")[int(rng.random() < 0.5)]
        watch.take(experiment(), record(name, float(rng.normal(1 + (name == "v2") * lift)), unit=unit(at)))
    watch.count("digits", [gateway(5, [0.01] * 1000), gateway(5, [0.012] * 1000, "g2", "v2")])
    return watch


def test_a_report():
    shown = report("digits", experiment(), filled(0.5))
    assert json.loads(orjson.dumps(shown)) == shown
    score, rate, errors, latency = shown["metrics"]
    comparison = score["variants"][1]["comparison"]
    assert (comparison["verdict"], comparison["significant"], comparison["needed"]) == ("better", True, None)
    assert comparison["low"] < 0.5 < comparison["high"]
    assert rate["variants"][1]["comparison"]["verdict"] == "open"
    assert errors["variants"][1]["comparison"]["verdict"] == "open"
    assert latency["variants"][1]["comparison"]["verdict"] == "worse"
    assert shown["summary"] == "v2 is better than v1 in score. v2 is worse than v1 in latency."
    assert [each["requests"] for each in shown["variants"]] == [1005, 1005]
    assert not shown["sample_ratio"]["mismatch"]


def test_a_report_without_outcomes():
    shown = report("digits", experiment(), ExperimentWatch("x1"))
    assert shown["summary"] == "No difference is certain yet."
    assert shown["metrics"][0]["variants"][1]["comparison"]["needed"] == 200


def test_the_check_of_the_shares():
    watch = ExperimentWatch("x1")
    watch.count("digits", [gateway(0, [0.01] * 900), gateway(0, [0.01] * 100, "g2", "v2")])
    assert sample_ratio(experiment(share=10), watch)["mismatch"] is False
    found = sample_ratio(experiment(share=50), watch)
    assert (found["over"], found["mismatch"]) == ("requests", True)
    assert "do not have the planned shares" in report("digits", experiment(), watch)["summary"]
    for at in range(30_000):
        watch.take(experiment(), record(("v1", "v2")[at % 2], 1.0, unit=unit(at)))
    found = sample_ratio(experiment(), watch)
    assert (found["over"], found["mismatch"]) == ("units", False)
    assert UNITS_KEPT / 3 < len(watch.units) <= UNITS_KEPT
    watch.take(experiment(), record("v1", 1.0, unit=next(iter(watch.units))))
    assert sample_ratio(experiment(), watch)["counts"] == found["counts"], "a unit counts once"


def test_the_end():
    watch = filled()
    assert complete(experiment(), watch, 1e9) == ""
    assert complete(experiment(samples=10_000), watch, 1e9) == ""
    assert complete(experiment(samples=1000), watch, 1e9) == "each variant has 1000 outcomes of score"
    until = datetime(2026, 5, 1, 12, tzinfo=UTC)
    assert complete(experiment(until=until), watch, until.timestamp() - 1) == ""
    assert complete(experiment(until=until), watch, until.timestamp()).startswith(
        "the end of the experiment has passed: 2026-05-01"
    )
    naive = until.replace(tzinfo=None)
    assert complete(experiment(until=naive), watch, until.timestamp())


def test_the_memory_survives():
    watch = filled()
    watch.note(point_of(experiment(), watch, 100.0))
    again = ExperimentWatch.from_json(orjson.loads(orjson.dumps(watch.to_json())))
    shown, before = (orjson.dumps(report("digits", experiment(), each)) for each in (again, watch))
    assert shown == before
    assert not again.count("digits", [gateway(5, [0.01] * 1000), gateway(5, [0.012] * 1000, "g2", "v2")])
    for each in (watch, again):
        each.take(experiment(), record("v1", 3.0, unit=unit(5)))
    assert orjson.dumps(again.to_json()) == orjson.dumps(watch.to_json())


def test_the_history_stays_small():
    watch, at, taken = ExperimentWatch("x1"), 0.0, 0
    while taken < 1000:
        at += 1.0
        if watch.due(at):
            watch.note(ExperimentPoint(at, {}))
            taken += 1
    assert len(watch.points) <= 240
    assert watch.points[0].at == 1.0


def test_what_gateways_counted_before_an_experiment_does_not_count():
    """A rollout or another experiment may have ended just before."""
    watch = ExperimentWatch("x1")
    assert not watch.begun
    watch.begin("digits", [gateway(7, [0.01] * 40)])
    assert not watch.count("digits", [gateway(7, [0.01] * 40)])
    again = ExperimentWatch.from_json(orjson.loads(orjson.dumps(watch.to_json())))
    assert again.begun
    assert again.count("digits", [gateway(8, [0.01] * 42), gateway(0, [0.01] * 5, "g2")])
    assert again.requests_of("v1") == 8

"""Simulate experiments: how often equal versions seem to differ, and a picture of one that does differ.

``python -m benchmarks.experiments --runs 1000`` prints the shares of A/A experiments in which one of 200
looks finds a difference. ``--picture docs/images/experiment.svg`` draws an experiment of an hour.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from services.router.domain.experiment_report import point_of, report
from services.router.domain.experiment_watch import ExperimentWatch
from services.router.domain.experiments import Moments, compare
from tidegate.cli.experiment_picture import svg
from tidegate.kernel.protocol.experiments import Experiment, ExperimentMetric, ExperimentOptions
from tidegate.kernel.protocol.feedback import FeedbackRecord
from tidegate.kernel.protocol.latency_buckets import buckets_of
from tidegate.kernel.protocol.presence import GatewayReport, VariantCounts

LOOKS, STEP = 200, 100


def false_alarms(kind: str, runs: int, seed: int = 1) -> tuple[float, float]:
    """Return the shares of A/A experiments with a difference in one of 200 looks: ours, and a z-test's."""
    rng, ours, classic = np.random.default_rng(seed), 0, 0
    for _ in range(runs):
        values, treated = draw(kind, rng, LOOKS * STEP), rng.random(LOOKS * STEP) < 0.5
        sides = [running(values, treated == side) for side in (False, True)]
        found = [compare(*pair) for pair in zip(*sides, strict=True)]
        ours += any(each.low > 0 or each.high < 0 for each in found)
        classic += any(
            abs(each.difference) > 1.96 * (a.variance / a.n + b.variance / b.n) ** 0.5
            for each, a, b in zip(found, *sides, strict=True)
            if min(a.n, b.n) >= 30
        )
    return ours / runs, classic / runs


def draw(kind: str, rng: np.random.Generator, n: int) -> np.ndarray:
    """Return outcomes of a kind."""
    if kind == "normal":
        return rng.normal(3, 1, n)
    return (rng.random(n) < 0.1).astype(float) if kind == "clicks" else rng.lognormal(0, 1, n)


def running(values: np.ndarray, chosen: np.ndarray) -> list[Moments]:
    """Return the moments of the chosen values at each look."""
    n, total, squares = (
        np.cumsum(np.where(chosen, each, 0.0))[STEP - 1 :: STEP] for each in (1.0, values, values**2)
    )
    mean = total / n
    return [
        Moments(int(k), float(m), max(float(q - k * m * m), 0.0))
        for k, m, q in zip(n, mean, squares, strict=True)
    ]


def picture(seed: int = 3) -> str:
    """Return the picture of an hour: 20 users/s, and version 2 has a score that is 3 % higher."""
    metrics = [
        ExperimentMetric(name="score"),
        ExperimentMetric(name="errors", kind="errors", goal="down"),
        ExperimentMetric(name="latency", kind="latency", goal="down"),
    ]
    experiment = Experiment(
        treatments=["digits-v2"], control="digits-v1", id="x", options=ExperimentOptions(metrics=metrics)
    )
    watch, rng = ExperimentWatch("x"), np.random.default_rng(seed)
    totals = {name: VariantCounts(0, [0] * 160) for name in experiment.variants}
    for second in range(0, 3600, 30):
        for user in range(600):
            name = experiment.variants[int(rng.random() < 0.5)]
            score = float(rng.normal(0.70 * (1.03 if name == "digits-v2" else 1.0), 0.25))
            unit = f"{(second * 1000 + user) * 0x9E3779B97F4A7C15 % 2**64:016x}"
            record = FeedbackRecord(
                "digits", name, "1", "r", "score", score, None, 0, 0, unit=unit, experiment="x"
            )
            watch.take(experiment, record)
            counts = totals[name]
            counts.failed += int(rng.random() < 0.004)
            times = buckets_of(rng.lognormal(np.log(0.02), 0.4, 1))
            counts.times = (np.array(counts.times) + times).tolist()
        traffic = {name: VariantCounts(each.failed, list(each.times)) for name, each in totals.items()}
        watch.count("digits", [GatewayReport("g", float(second), {}, {"digits": traffic})])
        if watch.due(float(second)):
            watch.note(point_of(experiment, watch, float(second)))
    return svg(report("digits", experiment, watch))


def main() -> None:
    """Print the shares, or draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if given.picture:
        given.picture.write_text(picture())
        return
    for kind in ("normal", "clicks", "skewed"):
        ours, classic = false_alarms(kind, given.runs)
        print(f"{kind}: {given.runs} A/A experiments, 200 looks: {ours:.1%} false, z-test {classic:.1%}")


if __name__ == "__main__":
    main()

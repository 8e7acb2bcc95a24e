"""Report an experiment: each variant's numbers, the comparisons with the control, and a summary. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from math import inf, isfinite, sqrt
from typing import Any

from services.router.domain.experiment_watch import MIN_UNITS, ExperimentPoint, ExperimentWatch
from services.router.domain.experiments import (
    Comparison,
    as_json,
    compare,
    interval,
    needed_for,
    ratio_e_value,
    significant,
)
from tidegate.kernel.protocol.experiments import Experiment, ExperimentMetric

# The shares of the variants count as wrong if the e-value is at least this. If the planned shares are right,
# at most 1 of 20 experiments ever reaches it.
MISMATCH_AT = 20.0

Comparisons = dict[str, dict[str, Comparison]]


def report(endpoint: str, experiment: Experiment, watch: ExperimentWatch) -> dict[str, Any]:
    """Return the whole report for JSON. Infinite numbers are null."""
    found = comparisons(experiment, watch)
    counted = _significant(experiment, found)
    metrics = [_metric(experiment, metric, watch, found, counted) for metric in experiment.options.metrics]
    ratio = sample_ratio(experiment, watch)
    return {
        "endpoint": endpoint,
        "experiment": experiment.model_dump(mode="json"),
        "variants": [
            {
                "deployment": name,
                "role": "treatment" if at else "control",
                "share": _shares(experiment)[at],
                "requests": watch.requests_of(name),
            }
            for at, name in enumerate(experiment.variants)
        ],
        "metrics": metrics,
        "sample_ratio": ratio,
        "summary": _summary(experiment, metrics, ratio, late=watch.late),
        "points": [{"at": point.at, "differences": point.differences} for point in watch.points],
    }


def comparisons(experiment: Experiment, watch: ExperimentWatch) -> Comparisons:
    """Return the comparison of each treatment with the control, by metric and treatment."""
    return {
        metric.name: {
            treatment: _compared(experiment, metric, treatment, watch) for treatment in experiment.treatments
        }
        for metric in experiment.options.metrics
    }


def point_of(experiment: Experiment, watch: ExperimentWatch, now: float) -> ExperimentPoint:
    """Return the current comparisons as a point of the history."""
    return ExperimentPoint(
        now,
        {
            metric: {
                treatment: (_finite(each.difference), _finite(each.low), _finite(each.high))
                for treatment, each in by_treatment.items()
            }
            for metric, by_treatment in comparisons(experiment, watch).items()
        },
    )


def sample_ratio(experiment: Experiment, watch: ExperimentWatch) -> dict[str, Any]:
    """Return the planned and the actual shares of the variants, and a verdict on their difference.

    ``mismatch`` is True if the actual shares contradict the planned ones. The actual shares count the units
    that were sampled from the feedback. If there are none, the actual shares count requests.
    """
    number = len(experiment.variants)
    if watch.units:
        over, counts = "units", [list(watch.units.values()).count(at) for at in range(number)]
    else:
        over, counts = "requests", [watch.requests_of(name) for name in experiment.variants]
    shares = _shares(experiment)
    evidence = ratio_e_value(counts, shares) if sum(counts) else 1.0
    total = sum(counts) or 1
    return {
        "over": over,
        "counts": counts,
        "expected": shares,
        "found": [100 * count / total for count in counts],
        "evidence": min(evidence, 1e9),
        "mismatch": evidence >= MISMATCH_AT,
    }


def complete(experiment: Experiment, watch: ExperimentWatch, now: float) -> str:
    """Return the reason why a running experiment is complete now; an empty text if it must go on."""
    options = experiment.options
    if options.until is not None:
        until = options.until if options.until.tzinfo else options.until.replace(tzinfo=UTC)
        if datetime.fromtimestamp(now, UTC) >= until:
            return f"the end of the experiment has passed: {until:%Y-%m-%d %H:%M} UTC"
    if options.samples is None:
        return ""
    metric = options.metrics[0]
    fewest = min(watch.outcomes_of(name, metric).n for name in experiment.variants)
    if fewest < options.samples:
        return ""
    return f"each variant has {options.samples} outcomes of {metric.name}"


def _compared(
    experiment: Experiment, metric: ExperimentMetric, treatment: str, watch: ExperimentWatch
) -> Comparison:
    control = watch.outcomes_of(experiment.control, metric)
    variant = watch.outcomes_of(treatment, metric)
    found = compare(control, variant, experiment.options.alpha)
    if all(watch.enough_units(name, metric) for name in (experiment.control, treatment)):
        return found
    return replace(found, low=-inf, high=inf, p_value=1.0, e_value=0.0, needed=None)


def _significant(experiment: Experiment, found: Comparisons) -> frozenset[str]:
    """Return the significant comparisons, each as ``metric`` + NUL + ``treatment``."""
    e_values = {
        f"{metric}\0{treatment}": each.e_value
        for metric, by_treatment in found.items()
        for treatment, each in by_treatment.items()
    }
    return significant(e_values, experiment.options.alpha)


def _metric(
    experiment: Experiment,
    metric: ExperimentMetric,
    watch: ExperimentWatch,
    found: Comparisons,
    counted: frozenset[str],
) -> dict[str, Any]:
    variants = []
    control = watch.outcomes_of(experiment.control, metric)
    for name in experiment.variants:
        moments = watch.outcomes_of(name, metric)
        low, high = interval(moments, experiment.options.alpha)
        shown: dict[str, Any] = {
            "deployment": name,
            "outcomes": moments.n,
            "mean": moments.mean if moments.n else None,
            "deviation": sqrt(moments.variance) if moments.n > 1 else None,
            "low": _finite(low),
            "high": _finite(high),
            "enough_units": watch.enough_units(name, metric),
            "comparison": None,
        }
        if name != experiment.control:
            each = found[metric.name][name]
            shown["comparison"] = as_json(each) | {
                "needed_for_min_lift": needed_for(
                    control, moments, metric.min_lift, experiment.options.alpha
                ),
                "significant": f"{metric.name}\0{name}" in counted,
                "verdict": _verdict(metric, each, f"{metric.name}\0{name}" in counted),
            }
        variants.append(shown)
    return {
        "name": metric.name,
        "kind": metric.kind,
        "goal": metric.goal,
        "min_lift": metric.min_lift,
        "variants": variants,
    }


def _verdict(metric: ExperimentMetric, found: Comparison, counts: bool) -> str:
    if counts:
        return "better" if (found.difference > 0) == (metric.goal == "up") else "worse"
    return "open"


def _summary(
    experiment: Experiment, metrics: Sequence[dict[str, Any]], ratio: dict[str, Any], *, late: bool
) -> str:
    said = []
    if ratio["mismatch"]:
        said.append(
            f"The {ratio['over']} do not have the planned shares, so the comparison is not valid. Look for "
            "requests that fail or lose their sticky key."
        )
    if late:
        said.append("Some feedback was lost before the router read it.")
    if any(not variant["enough_units"] for metric in metrics for variant in metric["variants"]):
        said.append(f"The outcomes come from too few units: each variant needs about {MIN_UNITS}.")
    for treatment in experiment.treatments:
        for verdict in ("better", "worse"):
            names = [
                metric["name"]
                for metric in metrics
                for variant in metric["variants"]
                if variant["deployment"] == treatment
                and variant["comparison"]
                and variant["comparison"]["verdict"] == verdict
            ]
            if names:
                said.append(f"{treatment} is {verdict} than {experiment.control} in {', '.join(names)}.")
    return " ".join(said) or "No difference is certain yet."


def _shares(experiment: Experiment) -> list[float]:
    share = experiment.options.share
    each = share / len(experiment.treatments)
    return [float(100 - share), *(each for _ in experiment.treatments)]


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None

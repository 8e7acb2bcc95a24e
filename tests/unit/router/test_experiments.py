"""The statistics of experiments: false alarms under repeated looks, and the numbers of a reference."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest

from services.router.domain.experiments import (
    Moments,
    as_json,
    best_rho,
    compare,
    interval,
    needed_for,
    radius,
    ratio_e_value,
    significant,
)
from tests.unit.router.ville_numbers import draw

pytestmark = pytest.mark.unit

LOOKS = 200
# Intervals of a mean, made by ville 0.1.0 with ``tests/unit/router/ville_numbers.py``.
VILLE = [
    ("normal", 150, 0.05, 500, 2.579749, 3.683838),
    ("normal", 1000, 0.05, 5000, 2.823892, 3.260377),
    ("normal", 1000, 0.01, 500, 2.807604, 3.276665),
    ("normal", 20000, 0.05, 5000, 2.956462, 3.045444),
    ("clicks", 150, 0.05, 500, 0.001498, 0.131836),
    ("clicks", 1000, 0.05, 5000, 0.059694, 0.120306),
    ("clicks", 1000, 0.01, 500, 0.057433, 0.122567),
    ("clicks", 20000, 0.05, 5000, 0.089090, 0.102110),
    ("skewed", 150, 0.05, 500, 1.198621, 2.587481),
    ("skewed", 1000, 0.05, 5000, 1.484698, 1.981733),
    ("skewed", 1000, 0.01, 500, 1.466151, 2.000280),
    ("skewed", 20000, 0.05, 5000, 1.607075, 1.701591),
]


def moments(values) -> Moments:
    found = Moments()
    for value in values:
        found = found.add(float(value))
    return found


def test_moments():
    values = np.random.default_rng(1).normal(5, 2, 1000)
    whole = moments(values)
    assert whole.mean == pytest.approx(values.mean())
    assert whole.variance == pytest.approx(values.var(ddof=1))
    merged = moments(values[:300]).merge(moments(values[300:]))
    assert (merged.n, merged.mean) == pytest.approx((whole.n, whole.mean))
    assert merged.squares == pytest.approx(whole.squares)
    assert Moments().merge(whole) == whole
    assert whole.merge(Moments()) == whole


@pytest.mark.parametrize(("kind", "n", "alpha", "best_at", "low", "high"), VILLE)
def test_the_interval_equals_that_of_another_library(kind, n, alpha, best_at, low, high):
    found = interval(moments(draw(kind, n)), alpha, best_at)
    assert found == pytest.approx((low, high), abs=1e-4)


def test_the_interval_is_narrowest_where_it_was_asked_to_be():
    best = best_rho(1000, 0.05)
    assert all(radius(1000, 1.0, 0.05, best) < radius(1000, 1.0, 0.05, best * by) for by in (0.95, 1.05))


def false_alarms(outcomes, runs: int, step: int = 100) -> tuple[int, int]:
    """Return in how many runs one of 200 looks finds a difference, which there is not: ours, and a z-test."""
    rng = np.random.default_rng(7)
    ours = classic = 0
    for _ in range(runs):
        values, groups = outcomes(rng, LOOKS * step), rng.random(LOOKS * step) < 0.5
        found = [False, False]
        totals = {}
        for group in (False, True):
            mask = groups == group
            totals[group] = [np.cumsum(np.where(mask, x, 0)) for x in (1.0, values, values**2)]
        for look in range(step - 1, LOOKS * step, step):
            pair = []
            for group in (False, True):
                n, total, squares = (float(each[look]) for each in totals[group])
                mean = total / max(n, 1)
                pair.append(Moments(int(n), mean, max(squares - n * mean * mean, 0.0)))
            if min(each.n for each in pair) < 30:
                continue
            result = compare(pair[0], pair[1])
            found[0] |= result.low > 0 or result.high < 0
            error = (pair[0].variance / pair[0].n + pair[1].variance / pair[1].n) ** 0.5
            found[1] |= error > 0 and abs(result.difference) > 1.96 * error
            if found[0]:
                break
        ours += found[0]
        classic += found[1]
    return ours, classic


@pytest.mark.parametrize("kind", ["normal", "clicks", "skewed"])
def test_equal_variants_with_200_looks(kind):
    """At most 5 % of the experiments without a difference may find one. A z-test finds one in a third."""
    runs = 200
    draws = {
        "normal": lambda rng, n: rng.normal(3, 1, n),
        "clicks": lambda rng, n: (rng.random(n) < 0.1).astype(float),
        "skewed": lambda rng, n: rng.lognormal(0, 1, n),
    }
    ours, classic = false_alarms(draws[kind], runs)
    assert ours <= 0.05 * runs
    assert classic >= 0.2 * runs


def test_a_real_difference_is_found():
    rng = np.random.default_rng(3)
    control, variant = moments(rng.normal(1.0, 1, 5000)), moments(rng.normal(1.1, 1, 5000))
    found = compare(control, variant)
    assert 0 < found.low < 0.1 < found.high
    assert found.p_value < 0.05
    assert found.e_value > 20
    assert found.lift == pytest.approx(0.1, abs=0.05)
    assert found.needed is None


def test_the_needed_outcomes_make_the_difference_certain():
    control, variant = Moments(500, 1.0, 500.0), Moments(500, 1.1, 500.0)
    found = compare(control, variant)
    assert found.low < 0 < found.high
    assert found.needed is not None
    for more, certain in ((found.needed, True), (found.needed - 2, False)):
        n = 500 + more / 2
        later = compare(Moments(int(n), 1.0, n), Moments(int(n) + more % 2, 1.1, n))
        assert (later.low > 0) is certain or abs(later.low) < 1e-4
    same = compare(control, Moments(500, 1.0, 500.0))
    assert (same.needed, same.p_value) == (None, 1.0)
    small, large = needed_for(control, variant, 0.01), needed_for(control, variant, 0.2)
    assert small is not None
    assert large is not None
    assert small > large
    assert needed_for(Moments(500, 0.0, 500.0), variant, 0.01) is None


def test_too_few_outcomes_say_nothing():
    found = compare(moments([1.0] * 50), moments([2.0] * 500))
    assert (found.low, found.high, found.p_value, found.needed) == (-inf, inf, 1.0, 50)
    shown = as_json(found)
    assert (shown["low"], shown["high"]) == (None, None)
    assert interval(moments([1.0] * 50)) == (-inf, inf)


def test_constant_outcomes():
    one, two = moments([1.0] * 200), moments([2.0] * 200)
    assert compare(one, one).p_value == 1.0
    assert as_json(compare(one, two))["e_value"] is None
    assert compare(one, two).p_value == 0.0


def test_several_metrics_are_corrected():
    assert significant({"a": 100.0, "b": 1.0, "c": 1.0}) == {"a"}
    assert significant({"a": 30.0, "b": 1.0, "c": 1.0}) == frozenset(), "20 would be enough for one metric"
    assert significant({"a": 30.0, "b": 31.0, "c": 1.0}) == {"a", "b"}
    assert significant({}) == frozenset()


def test_shares_that_differ_from_the_plan():
    assert ratio_e_value([5000, 5000], [50, 50]) < 1
    assert ratio_e_value([5200, 4800], [50, 50]) > 20
    assert ratio_e_value([9000, 1000], [90, 10]) < 1
    assert ratio_e_value([10, 0], [1, 0]) == 1.0
    assert ratio_e_value([10, 1], [1, 0]) == inf


def test_right_shares_with_200_looks():
    rng, suspected, runs = np.random.default_rng(5), 0, 300
    for _ in range(runs):
        counts = np.cumsum(rng.multinomial(50, [0.7, 0.2, 0.1], size=LOOKS), axis=0)
        suspected += any(ratio_e_value([int(each) for each in look], [70, 20, 10]) >= 20 for look in counts)
    assert suspected <= 0.05 * runs

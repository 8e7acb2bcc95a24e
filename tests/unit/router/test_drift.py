"""Drift: what is found, what is no alarm, and how a version's windows follow each other."""

from __future__ import annotations

import numpy as np
import pytest

from services.router.domain import distances
from services.router.domain.drift import DriftPolicy, compare
from services.router.domain.drift_history import LEARN_ROWS, DriftHistory, WindowLimits
from tidegate.kernel.profiles.baseline import training_baseline
from tidegate.kernel.profiles.bins import Bins, learn_all, summarize
from tidegate.kernel.profiles.columns import Columns
from tidegate.kernel.profiles.piece import ProfilePiece
from tidegate.kernel.profiles.profile import Profile

ROWS, FEATURES = 3000, 64
LIMITS, POLICY = WindowLimits(rows=ROWS), DriftPolicy()


def _columns(random: np.random.Generator, rows: int, features: int, shift: float = 0.0) -> Columns:
    table = random.standard_normal((rows, features))
    table[:, 0] += shift
    return Columns(rows, {f"x[{at}]": table[:, at] for at in range(features)})


def _profile(columns: Columns, bins: dict[str, Bins]) -> Profile:
    profile = Profile()
    profile.count(columns, bins)
    return profile


def _verdicts(seed: int, features: int, shift: float, windows: int, policy: DriftPolicy) -> list[list[str]]:
    """Return the columns that have drifted after each window. The baseline is the first window."""
    random = np.random.default_rng(seed)
    base = _columns(random, ROWS, features)
    bins = learn_all(base)
    held, above, found = _profile(base, bins), frozenset[str](), list[list[str]]()
    for _ in range(windows):
        result = compare(held, _profile(_columns(random, ROWS, features, shift), bins), bins, above, policy)
        above = result.above
        found.append(result.drifted)
    return found


def test_equal_data_raises_no_alarm_in_ten_thousand_feature_windows() -> None:
    alarms = [
        column for seed in range(8) for each in _verdicts(seed, FEATURES, 0.0, 20, POLICY) for column in each
    ]
    assert 8 * 20 * FEATURES > 10_000
    assert len(alarms) <= 10  # 1 in 1,000; there were 0 in 30,720


def test_a_shift_of_a_quarter_of_a_standard_deviation_is_found_within_two_windows() -> None:
    found = [_verdicts(seed, 1, 0.25, 2, POLICY)[1] == ["x[0]"] for seed in range(200)]
    assert sum(found) >= 198
    # Jensen-Shannon alone misses some of them.
    alone = DriftPolicy(ks=2.0)
    assert sum(_verdicts(seed, 1, 0.25, 2, alone)[1] == ["x[0]"] for seed in range(200)) < sum(found)


def test_the_shift_is_found_among_64_features_and_no_other_column_is_named() -> None:
    assert _verdicts(5, FEATURES, 0.25, 2, POLICY) == [[], ["x[0]"]]


def test_a_small_baseline_raises_the_limits() -> None:
    random = np.random.default_rng(3)
    base = _columns(random, 300, 1)
    bins = learn_all(base)
    window = _profile(_columns(random, ROWS, 1), bins)
    column = compare(_profile(base, bins), window, bins, (), POLICY).columns["x[0]"]
    assert column.state == "steady"
    assert column.distances is not None
    assert column.distances.js > POLICY.js
    assert column.js_limit > POLICY.js


def test_a_window_with_few_rows_has_no_verdict() -> None:
    random = np.random.default_rng(4)
    base = _columns(random, ROWS, 1)
    bins = learn_all(base)
    found = compare(_profile(base, bins), _profile(_columns(random, 100, 1, 9.0), bins), bins, (), POLICY)
    assert (found.state, found.reason) == ("unknown", "the window has 100 of 3000 rows")


def test_missing_values_are_a_drift() -> None:
    random = np.random.default_rng(5)
    base = _columns(random, ROWS, 1)
    bins = learn_all(base)
    holes = _columns(random, ROWS, 1)
    holes.numbers["x[0]"][:150] = np.nan
    column = compare(_profile(base, bins), _profile(holes, bins), bins, (), POLICY).columns["x[0]"]
    assert (column.state, column.missing) == ("suspect", 0.05)


def test_a_new_value_of_a_string_is_a_drift() -> None:
    base, window = Profile(), Profile()
    base.count(Columns(ROWS, {}, {"city": ["Bern", "Oslo", "Rome"] * 1000}), {})
    window.count(Columns(ROWS, {}, {"city": ["Bern", "Oslo", "Bonn"] * 1000}), {})
    assert compare(base, base, {}, (), POLICY).state == "steady"
    assert compare(base, window, {}, ("city",), POLICY).drifted == ["city"]


@pytest.mark.parametrize("n", [200, 1000, 6000])
def test_the_bootstrap_agrees_with_samples_of_equal_data(n: int) -> None:
    random = np.random.default_rng(6)
    draws = random.multinomial(n, np.full(32, 1 / 32), 4000)
    seen = np.quantile(distances.jensen_shannon(draws[:2000], draws[2000:]), 0.99)
    js, _ = distances.null_quantiles(draws[0], draws[1], 0.99)
    assert js == pytest.approx(seen, rel=0.1)


def test_the_distances_of_a_known_shift() -> None:
    values = np.random.default_rng(7).standard_normal(200_000)
    bins = learn_all(Columns(len(values), {"x": values}))["x"]
    p, q = (
        _profile(Columns(len(v), {"x": v}), {"x": bins}).numbers["x"].counts for v in (values, values + 1)
    )
    assert float(distances.kolmogorov_smirnov(p, q)) == pytest.approx(0.383, abs=0.01)
    assert distances.wasserstein(p, q, bins, 1.0) == pytest.approx(1.0, abs=0.25)
    assert distances.psi(p, q) == pytest.approx(1.0, abs=0.1)
    assert float(distances.jensen_shannon(p, p)) == 0.0


def _piece(history: DriftHistory, columns: Columns) -> ProfilePiece:
    if history.bins is None:
        summaries = {name: summarize(values) for name, values in columns.numbers.items()}
        return ProfilePiece("r", 0.0, 1.0, summaries=summaries, learned_rows=columns.rows)
    return ProfilePiece("r", 0.0, 1.0, history.bins_id, _profile(columns, history.bins))


def _run(history: DriftHistory, random: np.random.Generator, windows: int, shift: float = 0.0) -> None:
    for _ in range(windows):
        history.add(_piece(history, _columns(random, ROWS, 2, shift)))
        history.close(10.0, LIMITS, POLICY)


def test_a_version_learns_its_bins_freezes_its_baseline_and_finds_the_shift() -> None:
    history, random = DriftHistory(), np.random.default_rng(8)
    history.add(_piece(history, _columns(random, LEARN_ROWS, 2)))
    assert history.bins is not None
    assert history.baseline is None
    _run(history, random, 1)
    assert history.baseline is not None
    assert history.baseline.source == "first_rows"
    _run(history, random, 3)
    assert history.comparison is not None
    assert history.comparison.state == "steady"
    _run(history, random, 2, 0.25)
    assert history.comparison.drifted == ["x[0]"]
    assert [point.state for point in history.points] == ["steady"] * 3 + ["suspect", "drifted"]


def test_a_history_survives_its_file() -> None:
    history, random = DriftHistory(), np.random.default_rng(9)
    history.add(_piece(history, _columns(random, LEARN_ROWS, 2)))
    _run(history, random, 3, 0.0)
    _run(history, random, 2, 0.5)
    history.add(_piece(history, _columns(random, 10, 2)))
    read = DriftHistory.from_json(history.to_json(), POLICY)
    assert read.to_json() == history.to_json()
    assert read.comparison is not None
    assert read.comparison.drifted == ["x[0]"]


def test_pieces_with_other_bins_are_ignored() -> None:
    history, random = DriftHistory(), np.random.default_rng(10)
    history.use_training(training_baseline(_columns(random, 5000, 2)))
    piece = _piece(history, _columns(random, 100, 2))
    piece.bins_id = "other"
    history.add(piece)
    assert history.open is None
    _run(history, random, 2, 0.25)
    assert history.comparison is not None
    assert history.comparison.drifted == ["x[0]"]


def test_a_window_that_is_old_is_closed_without_a_verdict() -> None:
    history, random = DriftHistory(), np.random.default_rng(11)
    history.use_training(training_baseline(_columns(random, 5000, 2)))
    history.add(_piece(history, _columns(random, 100, 2)))
    assert not history.close(100.0, LIMITS, POLICY)
    assert history.close(LIMITS.seconds + 1, LIMITS, POLICY)
    assert history.comparison is not None
    assert history.comparison.state == "unknown"


def test_versions_are_compared_with_the_version_before() -> None:
    random = np.random.default_rng(12)
    first, second = DriftHistory(), DriftHistory()
    first.use_training(training_baseline(_columns(random, 5000, 2)))
    assert first.bins is not None
    second.use_bins(first.bins)
    _run(first, random, 1)
    assert second.against(first, POLICY) is None
    _run(second, random, 2, 0.5)
    found = second.against(first, POLICY)
    assert found is not None
    assert found.above == {"x[0]"}
    assert second.comparison is not None
    assert second.comparison.state == "steady"


def test_a_rebase_freezes_a_new_baseline() -> None:
    history, random = DriftHistory(), np.random.default_rng(13)
    history.add(_piece(history, _columns(random, LEARN_ROWS, 2)))
    _run(history, random, 1)
    _run(history, random, 2, 0.5)
    history.reset()
    _run(history, random, 3, 0.5)
    assert history.comparison is not None
    assert history.comparison.state == "steady"

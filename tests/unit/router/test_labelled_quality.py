"""Quality of predictions with labels and without: measures, joins, windows, and a drop."""

from __future__ import annotations

import numpy as np
import pytest

from services.router.domain.labelled_rows import BINS, Labelled, LabelledRows, same
from services.router.domain.quality_estimate import calibrated, estimate, isotonic
from services.router.domain.quality_history import EARLY_S, QualityHistory, QualityLimits
from tidegate.kernel.profiles.bins import FIXED_BINS
from tidegate.kernel.profiles.columns import Columns
from tidegate.kernel.profiles.piece import SampledPrediction
from tidegate.kernel.profiles.profile import Profile

LIMITS = QualityLimits(rows=500, seconds=3600, predictions=5000)


def _rows(*pairs: Labelled) -> LabelledRows:
    rows = LabelledRows()
    for pair in pairs:
        rows.add(pair)
    return rows


def test_accuracy_compares_labels() -> None:
    rows = _rows(Labelled("cat", "cat", None, 0.9), Labelled("dog", "cat", None, 0.8))
    assert rows.measures()["accuracy"] == 0.5


@pytest.mark.parametrize(("label", "truth"), [("1", "1.0"), ("1", "true"), ("0", "False"), ("a", "a")])
def test_different_writings_of_a_label_are_the_same(label: str, truth: str) -> None:
    assert same(label, truth)
    assert not same(label, "other")


def test_the_area_under_the_curve_is_that_of_all_pairs() -> None:
    random = np.random.default_rng(1)
    truth = random.random(2000) < 0.3
    scores = np.clip(random.normal(0.35 + 0.3 * truth, 0.2), 0, 1)
    rows = _rows(*(Labelled(str(int(t)), None, float(s), None) for t, s in zip(truth, scores, strict=True)))
    pairs = scores[truth][:, None] - scores[~truth][None, :]
    exact = ((pairs > 0) + (pairs == 0) / 2).mean()
    assert rows.measures()["auc"] == pytest.approx(exact, abs=0.003)
    assert rows.measures()["accuracy"] == pytest.approx(((scores >= 0.5) == truth).mean())


def test_the_score_is_that_of_the_second_class_whatever_its_name() -> None:
    pairs = [("yes", "yes", 0.9), ("no", "no", 0.2), ("yes", "no", 0.4), ("no", "no", 0.1)]
    rows = _rows(*(Labelled(truth, label, score, None) for truth, label, score in pairs))
    assert rows.positives.sum() == 2
    assert rows.measures()["auc"] == 1.0


def test_calibrated_probabilities_have_no_calibration_error_and_others_have() -> None:
    random = np.random.default_rng(2)
    confidence = random.uniform(0.5, 1, 20_000)
    hits = random.random(20_000) < confidence
    right = [Labelled("a" if h else "b", "a", None, float(c)) for h, c in zip(hits, confidence, strict=True)]
    proud = [Labelled(each.truth, each.label, None, 0.99) for each in right]
    assert _rows(*right).measures()["ece"] < 0.015
    assert _rows(*proud).measures()["ece"] == pytest.approx(0.99 - hits.mean(), abs=0.01)


def test_numbers_have_an_error() -> None:
    rows = _rows(Labelled("3.5", None, 3.0, None), Labelled("10", None, 12.0, None))
    assert rows.measures() == {"mae": 1.25, "rmse": pytest.approx(np.sqrt((0.25 + 4) / 2))}


def test_a_truth_that_says_nothing_about_the_prediction_is_not_counted() -> None:
    assert _rows(Labelled("good", None, 3.0, None)).n == 0


def _window(probabilities: np.ndarray) -> Profile:
    profile = Profile()
    confidence = np.maximum(probabilities, 1 - probabilities)
    columns = Columns(len(probabilities), {"confidence": confidence, "score": probabilities})
    profile.count(columns, {"confidence": FIXED_BINS, "score": FIXED_BINS})
    return profile


def test_the_estimate_of_calibrated_probabilities_is_the_accuracy() -> None:
    random = np.random.default_rng(3)
    p = random.beta(2, 2, 50_000)
    truth = random.random(50_000) < p
    found = estimate(_window(p), LabelledRows())
    assert found is not None
    assert (found["method"], found["calibrated"]) == ("CBPE", False)
    assert found["accuracy"] == pytest.approx(((p >= 0.5) == truth).mean(), abs=0.01)
    order = np.argsort(p)
    ranks = np.empty(len(p))
    ranks[order] = np.arange(len(p))
    n = truth.sum()
    area = (ranks[truth].sum() - n * (n - 1) / 2) / (n * (len(p) - n))
    assert found["auc"] == pytest.approx(area, abs=0.01)


def test_labels_calibrate_the_estimate_of_an_overconfident_model() -> None:
    random = np.random.default_rng(4)
    real = random.beta(2, 2, 20_000)
    said = np.where(real >= 0.5, np.sqrt(real), 1 - np.sqrt(1 - real))
    truth = random.random(20_000) < real
    accuracy = ((real >= 0.5) == truth).mean()
    labelled = LabelledRows()
    for p, t in zip(said[:5000], truth[:5000], strict=True):
        labelled.add(Labelled(str(int(t)), None, float(p), None))
    window = _window(said[5000:])
    before, after = estimate(window, LabelledRows()), estimate(window, labelled)
    assert before is not None
    assert after is not None
    assert before["accuracy"] > accuracy + 0.05
    assert after["accuracy"] == pytest.approx(accuracy, abs=0.015)


def test_a_model_without_probabilities_has_no_estimate() -> None:
    assert estimate(Profile(), LabelledRows()) is None


def test_few_labels_do_not_calibrate() -> None:
    hits = np.zeros(BINS, np.int64)
    assert calibrated(np.array([0.5]), hits, hits) is None


def test_isotonic_values_do_not_fall() -> None:
    found = isotonic(np.array([0.1, 0.4, 0.2, 0.9]), np.array([1.0, 1.0, 3.0, 1.0]))
    assert found.tolist() == [0.1, 0.25, 0.25, 0.9]


def _prediction(number: int, label: str = "a", at: float = 0.0) -> SampledPrediction:
    return SampledPrediction(f"r{number}", label, None, 0.9, at)


def test_labels_are_joined_whichever_comes_first() -> None:
    history = QualityHistory()
    history.add_predictions([_prediction(1)], 0.0, LIMITS)
    history.add_label("r1", "a", 1.0)
    history.add_label("r2", "b", 1.0)
    history.add_predictions([_prediction(2)], 2.0, LIMITS)
    assert (history.joined, history.open.measures()["accuracy"]) == (2, 0.5)


def test_a_label_counts_once_and_that_of_an_unsampled_request_is_forgotten() -> None:
    history = QualityHistory()
    history.add_predictions([_prediction(1)], 0.0, LIMITS)
    history.add_label("r1", "a", 1.0)
    history.add_label("r1", "a", 2.0)
    history.forget_early(3.0)
    assert (history.joined, history.unmatched) == (1, 0)
    history.forget_early(3.0 + EARLY_S)
    assert (history.joined, history.unmatched, len(history.early)) == (1, 1, 0)


def test_predictions_are_bounded_and_expire() -> None:
    history = QualityHistory()
    history.add_predictions([_prediction(n) for n in range(LIMITS.predictions + 10)], 0.0, LIMITS)
    assert len(history.waiting) == LIMITS.predictions
    history.add_predictions([], LIMITS.keep_s + 1, LIMITS)
    assert not history.waiting


def _label(history: QualityHistory, random: np.random.Generator, windows: int, accuracy: float) -> None:
    for _ in range(windows):
        for _ in range(LIMITS.rows):
            history.open.add(Labelled("a" if random.random() < accuracy else "b", "a", None, 0.9))
            history.begin = 0.0
        assert history.close(10.0, LIMITS)


def test_a_drop_of_the_accuracy_is_found_in_two_windows_and_noise_is_not() -> None:
    history, random = QualityHistory(), np.random.default_rng(5)
    _label(history, random, 40, 0.9)
    assert {point.state for point in history.points[1:]} == {"steady"}
    _label(history, random, 2, 0.8)
    assert [point.state for point in history.points[-2:]] == ["suspect", "dropped"]


def test_a_rise_of_the_error_of_numbers_is_a_drop() -> None:
    history, random = QualityHistory(), np.random.default_rng(6)
    for error in (1.0, 1.0, 1.5, 1.5):
        for value in random.normal(0, error, LIMITS.rows):
            history.open.add(Labelled("10", None, 10 + float(value), None))
        history.begin = 0.0
        history.close(1.0, LIMITS)
    assert [point.state for point in history.points] == ["unknown", "steady", "suspect", "dropped"]


def test_a_history_survives_its_file() -> None:
    history, random = QualityHistory(), np.random.default_rng(7)
    _label(history, random, 2, 0.9)
    history.add_predictions([_prediction(1)], 0.0, LIMITS)
    history.add_label("r1", "a", 1.0)
    history.add_estimate({"accuracy": 0.9}, 1.0)
    assert QualityHistory.from_json(history.to_json()).to_json() == history.to_json()


def test_an_error_without_a_square_is_not_counted() -> None:
    rows = _rows(Labelled("1e200", None, 3.0, None), Labelled("2", None, 3.0, None))
    assert (rows.n, rows.measures()) == (1, {"mae": 1.0, "rmse": 1.0})

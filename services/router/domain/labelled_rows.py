"""The quality of predictions with known labels: accuracy, AUC, error and calibration. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

# The number of bins for probabilities. The AUC compares pairs of scores. If both scores are in the same bin,
# the pair is a tie and counts half.
BINS = 100
# For the calibration error, predictions are divided by confidence into this many bins (as in Guo et al., ICML
# 2017).
CALIBRATION_BINS = 15
# A prediction with a larger error is not counted, because the error's square would not fit into a float.
MOST_ERROR = 1e100

Counts = npt.NDArray[np.int64]


def _counts(bins: int) -> Counts:
    return np.zeros(bins, np.int64)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A prediction and its true label or value (``truth``).

    ``score`` and ``confidence`` are as in ``SampledPrediction``; None if not known.
    """

    truth: str
    label: str | None
    score: float | None
    confidence: float | None


@dataclass(slots=True)
class LabelledRows:
    """Counts of predictions with known labels, from which the quality measures are computed.

    ``hits``, ``misses``: right and wrong predictions, by bin of the confidence. ``positives``: predictions
    whose true class is the second of two classes, by bin of the score. ``negatives``: the same for the first
    class. ``numbers``: predictions of a number, not of a class.
    """

    n: int = 0
    correct: int = 0
    labelled: int = 0
    hits: Counts = field(default_factory=lambda: _counts(BINS))
    misses: Counts = field(default_factory=lambda: _counts(BINS))
    positives: Counts = field(default_factory=lambda: _counts(BINS))
    negatives: Counts = field(default_factory=lambda: _counts(BINS))
    numbers: int = 0
    absolute: float = 0.0
    squares: float = 0.0

    def add(self, pair: Labelled) -> None:
        """Count a prediction. Ignore it if it cannot be compared with its true label or value."""
        label, confidence = pair.label, pair.confidence
        truth = _number(pair.truth)
        if label is None and _is_probability(pair.score) and truth in (0.0, 1.0):
            assert pair.score is not None
            label = "1" if pair.score >= 0.5 else "0"
            confidence = max(pair.score, 1 - pair.score)
            self._add_class(str(int(truth)) == label, confidence, pair.score)
        elif label is not None:
            self._add_class(same(label, pair.truth), confidence, pair.score)
        elif pair.score is not None and truth is not None and abs(pair.score - truth) <= MOST_ERROR:
            self._add_number(pair.score, truth)
        else:
            return
        self.n += 1

    def _add_class(self, hit: bool, confidence: float | None, score: float | None) -> None:
        self.labelled += 1
        self.correct += hit
        if confidence is not None:
            (self.hits if hit else self.misses)[bin_of(confidence)] += 1
        if score is not None and _is_probability(score):
            # The score is the probability of the second class. The true class is the second class in two
            # cases: the prediction is right and the score is at least 0.5, or the prediction is wrong and the
            # score is less than 0.5.
            positive = hit == (score >= 0.5)
            (self.positives if positive else self.negatives)[bin_of(score)] += 1

    def _add_number(self, predicted: float, truth: float) -> None:
        self.numbers += 1
        self.absolute += abs(predicted - truth)
        self.squares += (predicted - truth) ** 2

    def merge(self, other: LabelledRows) -> None:
        """Add the counts of ``other``."""
        for name in _FIELDS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def measures(self) -> dict[str, float]:
        """Return the quality measures by name: accuracy, auc, ece, mae and rmse.

        A measure is left out if it cannot be computed from these predictions.
        """
        found: dict[str, float] = {}
        if self.labelled:
            found["accuracy"] = self.correct / self.labelled
        if (area := auc(self.positives, self.negatives)) is not None:
            found["auc"] = area
        if (error := calibration_error(self.hits, self.misses)) is not None:
            found["ece"] = error
        if self.numbers:
            found["mae"] = self.absolute / self.numbers
            found["rmse"] = math.sqrt(self.squares / self.numbers)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        found = {name: getattr(self, name) for name in _FIELDS}
        return {name: each.tolist() if isinstance(each, np.ndarray) else each for name, each in found.items()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> LabelledRows:
        """Read the result of :meth:`to_json`. Raise KeyError or ValueError if ``found`` cannot be read."""
        values: dict[str, Any] = {
            name: np.asarray(found[name], np.int64) if isinstance(found[name], list) else found[name]
            for name in _FIELDS
        }
        return cls(**values)


_FIELDS = (
    *("n", "correct", "labelled", "hits", "misses", "positives", "negatives"),
    *("numbers", "absolute", "squares"),
)


def bin_of(probability: float) -> int:
    """Return the index of a probability's bin."""
    return min(BINS - 1, max(0, int(probability * BINS)))


def auc(positives: Counts, negatives: Counts) -> float | None:
    """Return the area under the ROC curve from counts by score; None if a class has no predictions.

    It is the probability that a positive has a higher score than a negative (Hanley and McNeil, 1982).
    """
    p, n = positives.sum(), negatives.sum()
    if not p or not n:
        return None
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / (p * n))


def calibration_error(hits: Counts, misses: Counts) -> float | None:
    """Return the expected calibration error; None without confidences."""
    total = hits + misses
    if not total.sum():
        return None
    middles = (np.arange(BINS) + 0.5) / BINS
    groups = np.minimum((middles * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    n = np.bincount(groups, total, CALIBRATION_BINS)
    right = np.bincount(groups, hits, CALIBRATION_BINS)
    believed = np.bincount(groups, total * middles, CALIBRATION_BINS)
    return float(np.abs(right - believed).sum() / n.sum())


def same(label: str, truth: str) -> bool:
    """Return True if a predicted label equals the true one. ``1``, ``1.0`` and ``true`` are equal."""
    if label == truth:
        return True
    a, b = _number(label), _number(truth)
    return a is not None and a == b


def _number(text: str) -> float | None:
    lowered = text.lower()
    if lowered in ("true", "false"):
        return float(lowered == "true")
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _is_probability(score: float | None) -> bool:
    return score is not None and 0.0 <= score <= 1.0

"""Estimate the accuracy and the AUC of a classifier without labels, from its own probabilities. Pure.

The method is confidence-based performance estimation (CBPE) of NannyML. If the probabilities are calibrated,
a prediction with confidence c is right with probability c. So the mean confidence is the expected accuracy.
If at least ``MIN_LABELS`` labels are known, isotonic regression calibrates the probabilities first. The
estimate cannot detect concept drift, in which the same inputs get other labels. Only labels can show that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from services.router.domain.labelled_rows import LabelledRows
from tidegate.kernel.profiles.bins import FIXED_CUTS
from tidegate.kernel.profiles.predictions import CONFIDENCE, SCORE
from tidegate.kernel.profiles.profile import NumberCounts, Profile

# To calibrate probabilities, at least this many labels are needed.
MIN_LABELS = 500
_EDGES = np.array([0.0, *FIXED_CUTS, 1.0])
MIDDLES = (_EDGES[1:] + _EDGES[:-1]) / 2

Shares = npt.NDArray[np.float64]


def estimate(window: Profile, labelled: LabelledRows) -> dict[str, Any] | None:
    """Return the estimated measures of a window; None if the model returns no probabilities."""
    confidence = window.numbers.get(CONFIDENCE)
    if confidence is None or not confidence.n or len(confidence.counts) != len(MIDDLES):
        return None
    believed = calibrated(MIDDLES, labelled.hits, labelled.misses)
    found: dict[str, Any] = {"method": "CBPE", "calibrated": believed is not None, "rows": confidence.n}
    if believed is None:
        found["accuracy"] = confidence.mean
    else:
        found["accuracy"] = float((confidence.counts * believed).sum() / confidence.n)
    area = _estimated_auc(window.numbers.get(SCORE), labelled)
    return found if area is None else found | {"auc": area}


def calibrated(middles: Shares, hits: npt.NDArray[Any], misses: npt.NDArray[Any]) -> Shares | None:
    """Return the share of right predictions at each probability in ``middles``; None with too few labels.

    ``hits``, ``misses``: the number of right and wrong predictions with a label, by bin of the probability.
    The returned shares never decrease from one probability to the next.
    """
    total = hits + misses
    if total.sum() < MIN_LABELS:
        return None
    known = total > 0
    at = (np.arange(len(total))[known] + 0.5) / len(total)
    rates = isotonic(hits[known] / total[known], total[known].astype(float))
    return np.asarray(np.interp(middles, at, rates), np.float64)


def isotonic(values: Shares, weights: Shares) -> Shares:
    """Return the non-decreasing values closest to ``values`` (pool adjacent violators; Ayer et al., 1955)."""
    blocks: list[list[float]] = []  # each block: mean, weight, number of values
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append([value, weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, weight_, count = blocks.pop()
            last = blocks[-1]
            both = last[1] + weight_
            last[:] = [(last[0] * last[1] + mean * weight_) / both, both, last[2] + count]
    return np.concatenate([np.full(int(count), mean) for mean, _, count in blocks])


def _estimated_auc(scores: NumberCounts | None, labelled: LabelledRows) -> float | None:
    if scores is None or not scores.n or len(scores.counts) != len(MIDDLES):
        return None
    learned = calibrated(MIDDLES, labelled.positives, labelled.negatives)
    positive = scores.counts * (MIDDLES if learned is None else learned)
    negative = scores.counts - positive
    p, n = positive.sum(), negative.sum()
    if not p or not n:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (p * n))

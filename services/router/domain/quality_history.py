"""The quality of one version: join labels with predictions, close windows, and find a drop. Pure."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from services.router.domain.labelled_rows import Labelled, LabelledRows
from tidegate.kernel.profiles.piece import SampledPrediction

QualityState = Literal["unknown", "steady", "suspect", "dropped"]
POINTS_KEPT = 500
# The longest time in seconds that a label waits for its prediction. Workers publish predictions only every 10
# s, so the label can arrive first.
EARLY_S = 120.0
MAX_EARLY = 10_000


@dataclass(frozen=True, slots=True)
class QualityLimits:
    """The sizes of a version's windows, and the limits above which its quality has dropped.

    A window closes when it has ``rows`` labels, or after ``seconds``. At most ``predictions`` predictions
    wait for their labels, each for up to ``keep_s`` seconds. A later window is compared with the first
    window. It is worse if its accuracy is lower, or its error is higher, by more than ``drop`` and also by
    more than ``sigmas`` standard errors. For errors, ``drop`` is a fraction of the first window's error. The
    quality has dropped if two windows in a row are worse.
    """

    rows: int = 500
    seconds: float = 86_400.0
    predictions: int = 50_000
    keep_s: float = 7 * 86_400.0
    drop: float = 0.02
    sigmas: float = 3.1


@dataclass(frozen=True, slots=True)
class QualityPoint:
    """A closed window: its begin, its end, the number of its labels, its measures, and the verdict."""

    begin: float
    end: float
    rows: int
    measures: dict[str, float]
    state: QualityState


@dataclass(slots=True)
class QualityHistory:
    """The labels of one version, counted in windows.

    - ``waiting``: predictions without a label, oldest first
    - ``early``: labels without a prediction, with the time of their arrival
    - ``open``, ``begin``: the window that is not closed yet, and its start
    - ``first``: the first full window, with which later windows are compared
    - ``all``: the labels of all closed windows together
    - ``joined``: the number of labels that were joined with a prediction
    - ``unmatched``: the number of labels that were dropped because no prediction arrived
    """

    waiting: OrderedDict[str, SampledPrediction] = field(default_factory=OrderedDict)
    early: OrderedDict[str, tuple[str, float]] = field(default_factory=OrderedDict)
    open: LabelledRows = field(default_factory=LabelledRows)
    begin: float | None = None
    first: LabelledRows | None = None
    all: LabelledRows = field(default_factory=LabelledRows)
    points: list[QualityPoint] = field(default_factory=list)
    estimates: list[dict[str, Any]] = field(default_factory=list)
    joined: int = 0
    unmatched: int = 0

    def add_predictions(
        self, predictions: Iterable[SampledPrediction], now: float, limits: QualityLimits
    ) -> None:
        """Keep predictions until their labels arrive. Drop the oldest if they are too many or too old."""
        for each in predictions:
            early = self.early.pop(each.request_id, None)
            if early is not None:
                self._join(each, early[0], now)
            else:
                self.waiting[each.request_id] = each
                self.waiting.move_to_end(each.request_id)
        while self.waiting:
            oldest = next(iter(self.waiting.values()))
            if len(self.waiting) <= limits.predictions and now - oldest.at <= limits.keep_s:
                break
            self.waiting.popitem(last=False)

    def add_label(self, request_id: str, truth: str, now: float) -> None:
        """Join a label with its prediction. If the prediction is missing, keep the label for ``EARLY_S``."""
        prediction = self.waiting.pop(request_id, None)
        if prediction is not None:
            self._join(prediction, truth, now)
            return
        self.early[request_id] = (truth, now)

    def forget_early(self, now: float) -> None:
        """Drop the oldest labels that wait for a prediction, if they are too many or too old.

        Their requests were probably not sampled.
        """
        while self.early:
            _, (_, at) = next(iter(self.early.items()))
            if len(self.early) <= MAX_EARLY and now - at <= EARLY_S:
                return
            self.early.popitem(last=False)
            self.unmatched += 1

    def _join(self, prediction: SampledPrediction, truth: str, now: float) -> None:
        pair = Labelled(truth, prediction.label, prediction.score, prediction.confidence)
        if self.begin is None:
            self.begin = now
        self.open.add(pair)
        self.joined += 1

    def close(self, now: float, limits: QualityLimits) -> bool:
        """Close the open window if it is full or too old. Return True if it was closed."""
        if self.begin is None:
            return False
        full = self.open.n >= limits.rows
        if not full and now - self.begin < limits.seconds:
            return False
        window, begin = self.open, self.begin
        self.open, self.begin = LabelledRows(), None
        self.all.merge(window)
        state = self._judge(window, full, limits)
        if full and self.first is None:
            self.first = window
        point = QualityPoint(begin, now, window.n, window.measures(), state)
        self.points = [*self.points[1 - POINTS_KEPT :], point]
        return True

    def _judge(self, window: LabelledRows, full: bool, limits: QualityLimits) -> QualityState:
        if not full or self.first is None:
            return "unknown"
        if not dropped(self.first, window, limits):
            return "steady"
        return "dropped" if self.points and self.points[-1].state in ("suspect", "dropped") else "suspect"

    def add_estimate(self, found: Mapping[str, Any], at: float) -> None:
        """Keep an estimate of the quality that was made without labels."""
        self.estimates = [*self.estimates[1 - POINTS_KEPT :], {"at": at, **found}]

    @property
    def state(self) -> QualityState:
        """Return the verdict on the last window."""
        return self.points[-1].state if self.points else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Return the history for JSON, without the waiting predictions."""
        return {
            "open": self.open.to_json(),
            "begin": self.begin,
            "first": self.first.to_json() if self.first else None,
            "all": self.all.to_json(),
            "points": [asdict(point) for point in self.points],
            "estimates": self.estimates,
            "joined": self.joined,
            "unmatched": self.unmatched,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> QualityHistory:
        """Read the result of :meth:`to_json`. Raise KeyError, ValueError or TypeError if it is malformed."""
        return cls(
            open=LabelledRows.from_json(found["open"]),
            begin=found["begin"],
            first=LabelledRows.from_json(found["first"]) if found["first"] else None,
            all=LabelledRows.from_json(found["all"]),
            points=[QualityPoint(**point) for point in found["points"]],
            estimates=list(found["estimates"]),
            joined=int(found["joined"]),
            unmatched=int(found["unmatched"]),
        )


def dropped(first: LabelledRows, window: LabelledRows, limits: QualityLimits) -> bool:
    """Return True if a window is worse than the first window by more than the limits.

    The difference must exceed ``drop`` and also ``sigmas`` standard errors. For classes, the accuracies are
    compared with a test of two proportions. For numbers, the mean absolute errors are compared, and ``drop``
    is a fraction of the first window's error.
    """
    if first.labelled and window.labelled:
        p, q = first.correct / first.labelled, window.correct / window.labelled
        pooled = (first.correct + window.correct) / (first.labelled + window.labelled)
        noise = math.sqrt(pooled * (1 - pooled) * (1 / first.labelled + 1 / window.labelled))
        return p - q > max(limits.drop, limits.sigmas * noise)
    if first.numbers and window.numbers:
        before, after = first.absolute / first.numbers, window.absolute / window.numbers
        noise = math.sqrt(_variance(first) / first.numbers + _variance(window) / window.numbers)
        return after - before > max(limits.drop * before, limits.sigmas * noise)
    return False


def _variance(rows: LabelledRows) -> float:
    return max(0.0, rows.squares / rows.numbers - (rows.absolute / rows.numbers) ** 2)

"""The drift of one version: learn its bins, freeze its baseline, close windows and judge them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from services.router.domain.drift import ColumnDrift, Comparison, DriftPolicy, compare
from tidegate.kernel.profiles.baseline import Baseline, bins_id
from tidegate.kernel.profiles.bins import (
    FIXED,
    FIXED_BINS,
    Bins,
    Summary,
    bins_from_json,
    learn_from_summaries,
)
from tidegate.kernel.profiles.piece import ProfilePiece
from tidegate.kernel.profiles.profile import Profile

# Bins are learned from the summaries of the first rows, as soon as these summaries cover this many rows.
LEARN_ROWS = 1000
# The largest number of summaries of a column from which its bins are learned. A summary has at most 257
# numbers.
MAX_SUMMARIES = 1000
POINTS_KEPT = 500
TOP_COLUMNS = 10
ROWS_KEPT_S = 7 * 86_400.0


@dataclass(frozen=True, slots=True)
class WindowLimits:
    """The limits of a window: it is closed when it has ``rows`` rows, or ``seconds`` after its first row."""

    rows: int = 3000
    seconds: float = 86_400.0


@dataclass(slots=True)
class Window:
    """The profile of the rows that were sampled between two times (seconds since the epoch)."""

    begin: float
    end: float
    profile: Profile

    def to_json(self) -> dict[str, Any]:
        """Return the window for JSON."""
        return {"begin": self.begin, "end": self.end, "profile": self.profile.to_json()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Window:
        """Read the result of :meth:`to_json`."""
        return cls(float(found["begin"]), float(found["end"]), Profile.from_json(found["profile"]))


@dataclass(frozen=True, slots=True)
class Point:
    """A judged window in the history: its largest scores, and the columns that have drifted."""

    begin: float
    end: float
    rows: int
    state: str
    scores: dict[str, float]
    drifted: list[str]


@dataclass(frozen=True, slots=True)
class KeptRows:
    """A blob of raw rows: its key, the number of its rows, and its time in seconds since the epoch."""

    key: str
    rows: int
    at: float


@dataclass(slots=True)
class DriftHistory:
    """The bins, the baseline, the windows and the verdicts of one version.

    ``bins`` come from a training baseline, from the version before, or from the first rows. ``comparison`` is
    the verdict on the last closed window, ``last``.
    """

    bins: dict[str, Bins] | None = None
    baseline: Baseline | None = None
    summaries: dict[str, list[Summary]] = field(default_factory=dict)
    learned_rows: int = 0
    open: Window | None = None
    last: Window | None = None
    comparison: Comparison | None = None
    above_before: frozenset[str] = frozenset()
    points: list[Point] = field(default_factory=list)
    rows: int = 0
    dropped: int = 0
    kept: list[KeptRows] = field(default_factory=list)

    @property
    def bins_id(self) -> str:
        """Return the id of the bins; empty while they are not known."""
        return "" if self.bins is None else bins_id(self.bins)

    def use_training(self, baseline: Baseline | None) -> None:
        """Compare with this training baseline from now on. None: do not compare with a training baseline."""
        if baseline is None:
            if self.baseline is not None and self.baseline.source == "training":
                self.reset()
            return
        if self.baseline is not None and self.baseline.to_json() == baseline.to_json():
            return
        self.baseline, self.bins = baseline, dict(baseline.bins)
        self._add_fixed()
        self._restart()

    def use_bins(self, bins: Mapping[str, Bins]) -> None:
        """Use these bins if the version has none yet.

        With the bins of an earlier version, both versions can be compared.
        """
        if self.bins is None:
            self.bins = dict(bins)

    def reset(self) -> None:
        """Forget the baseline and the verdict. A new baseline is frozen from the next rows."""
        self.baseline = None
        self._restart()

    def _restart(self) -> None:
        self.summaries.clear()
        self.open = self.last = self.comparison = None
        self.above_before = frozenset()

    def _add_fixed(self) -> None:
        assert self.bins is not None
        for name in FIXED:
            self.bins.setdefault(name, FIXED_BINS)

    def add(self, piece: ProfilePiece) -> None:
        """Add a piece of a replica's profile.

        If the piece was counted with other bins, ignore its counts. The replica will read the present bins
        soon.
        """
        self.dropped += piece.dropped
        if piece.rows_key:
            self.kept.append(KeptRows(piece.rows_key, piece.rows, piece.end))
        if not piece.bins_id:
            self._learn(piece)
            return
        if piece.bins_id != self.bins_id or not piece.profile.rows:
            return
        self.rows += piece.profile.rows
        if self.open is None:
            self.open = Window(piece.begin, piece.end, Profile())
        self.open.end = max(self.open.end, piece.end)
        self.open.profile.add(piece.profile)

    def drop_rows(self, limit: int, now: float) -> list[str]:
        """Forget the raw rows that have expired, and the oldest rows if there are more than ``limit``.

        Return the keys of the blobs of the forgotten rows.
        """
        total, kept = 0, list[KeptRows]()
        for each in reversed(self.kept):
            if total < limit and now - each.at < ROWS_KEPT_S:
                kept.append(each)
                total += each.rows
        dropped = [each.key for each in self.kept if each not in kept]
        self.kept = kept[::-1]
        return dropped

    def _learn(self, piece: ProfilePiece) -> None:
        if self.bins is not None or not piece.learned_rows:
            return
        self.learned_rows += piece.learned_rows
        for name, summary in piece.summaries.items():
            held = self.summaries.setdefault(name, [])
            if len(held) < MAX_SUMMARIES:
                held.append(summary)
        if self.learned_rows >= LEARN_ROWS:
            self.bins = {name: learn_from_summaries(each) for name, each in self.summaries.items()}
            self._add_fixed()
            self.summaries.clear()

    def close(self, now: float, limits: WindowLimits, policy: DriftPolicy) -> bool:
        """Close the open window if it is full or old, and judge it. Return True if it was closed.

        Without a baseline, nothing is judged: a full window becomes the baseline, and a window that is old
        but not full stays open.
        """
        window = self.open
        if window is None or self.bins is None:
            return False
        full = window.profile.rows >= limits.rows
        if not full and now - window.begin < limits.seconds:
            return False
        self.open = None
        if self.baseline is None:
            if full:
                self.baseline = Baseline("first_rows", dict(self.bins), window.profile)
            else:
                self.open = replace(window, begin=now)  # a baseline needs the rows of a full window
            return full
        self.above_before = self.comparison.above if self.comparison is not None else frozenset()
        self.last = window
        self._judge(policy)
        self._remember(window)
        return True

    def _judge(self, policy: DriftPolicy) -> None:
        if self.last is not None and self.baseline is not None and self.bins is not None:
            self.comparison = compare(
                self.baseline.profile, self.last.profile, self.bins, self.above_before, policy
            )

    def _remember(self, window: Window) -> None:
        found = self.comparison
        assert found is not None
        top = {name: round(found.columns[name].score, 3) for name in found.ranked[:TOP_COLUMNS]}
        point = Point(window.begin, window.end, window.profile.rows, found.state, top, found.drifted)
        self.points = [*self.points[1 - POINTS_KEPT :], point]

    def against(self, other: DriftHistory | None, policy: DriftPolicy) -> Comparison | None:
        """Compare the last window with another version's last window; None if that is not possible.

        A column of numbers is compared only if both versions have the same bins for it. Only one window of
        each version is compared, so a column above its limit is suspect, but never drifted.
        """
        if other is None or other.last is None or self.last is None or other.bins is None or not self.bins:
            return None
        same = {name: each for name, each in self.bins.items() if other.bins.get(name) == each}
        return compare(other.last.profile, self.last.profile, same, (), policy)

    def to_json(self) -> dict[str, Any]:
        """Return the history for JSON."""
        return {
            "v": 1,
            "bins": None if self.bins is None else {name: b.to_json() for name, b in self.bins.items()},
            "baseline": self.baseline.to_json() if self.baseline else None,
            "open": self.open.to_json() if self.open else None,
            "last": self.last.to_json() if self.last else None,
            "above_before": sorted(self.above_before),
            "points": [asdict(point) for point in self.points],
            "rows": self.rows,
            "dropped": self.dropped,
            "kept": [asdict(each) for each in self.kept],
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any], policy: DriftPolicy) -> DriftHistory:
        """Read the result of :meth:`to_json`, and judge the last window again.

        Raise ValueError, KeyError or TypeError if ``found`` cannot be read.
        """
        history = cls(
            None if found["bins"] is None else bins_from_json(found["bins"]),
            Baseline.from_json(found["baseline"]) if found["baseline"] else None,
            open=Window.from_json(found["open"]) if found["open"] else None,
            last=Window.from_json(found["last"]) if found["last"] else None,
            above_before=frozenset(found["above_before"]),
            points=[Point(**point) for point in found["points"]],
            rows=int(found["rows"]),
            dropped=int(found["dropped"]),
            kept=[KeptRows(**each) for each in found.get("kept", [])],
        )
        history._judge(policy)
        return history


def worst(comparison: Comparison | None, count: int) -> list[tuple[str, ColumnDrift]]:
    """Return the columns with the largest scores."""
    if comparison is None:
        return []
    return [(name, comparison.columns[name]) for name in comparison.ranked[:count]]

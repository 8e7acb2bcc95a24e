"""Count sampled calls into a profile.

Only the sampler's thread imports and uses this module, because the import of numpy takes long.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import numpy as np

from services.worker.domain.raw_rows import SampledRow, raw_lines, rows_of
from services.worker.domain.sample_tensors import alike, joined_inputs, joined_outputs
from services.worker.domain.samples import SampledCall, SampledStream
from services.worker.domain.text_answers import text_answer
from tidegate.kernel import telemetry
from tidegate.kernel.profiles.bins import FIXED, Bins, summarize
from tidegate.kernel.profiles.columns import Columns, SampledTensor, add_tensor
from tidegate.kernel.profiles.piece import ProfilePiece, PublishedBins, SampledPrediction, Unreadable
from tidegate.kernel.profiles.predictions import Predictions, add_outputs
from tidegate.kernel.profiles.profile import Profile
from tidegate.kernel.profiles.texts import TextAnswer, add_texts

log = telemetry.logger(__name__)

# At most this many rows wait in memory until the router has computed the bins. A bin is a range of a column's
# values. If more rows wait, the oldest are dropped.
HELD_ROWS = 4096
# The profile is published in pieces. A piece has at most this many predictions. The router compares a
# prediction with the feedback about its request.
MAX_PREDICTIONS = 2500


class ProfileCounter:
    """Counts the values of sampled calls in bins, separately for each column.

    A bin is a range of a column's values. The router computes the bins. Until then, sampled rows wait in
    memory. They are counted when the bins are known.
    """

    def __init__(self, replica: str, redact: Collection[str] = (), keep_rows: int = 0) -> None:
        self._replica = replica
        self._redact = frozenset(redact)
        self._keep_rows = keep_rows
        self._kept: list[bytes] = []
        self._kept_hour, self._kept_in_hour = 0, 0
        self._raw_bins = b""
        self._bins: dict[str, Bins] | None = None
        self._bins_id = ""
        self._held: list[Columns] = []
        self._held_rows = self._summarized = 0
        self._profile = Profile()
        self._keeps_predictions = False
        self._predictions: list[SampledPrediction] = []
        self._begin = time.time()
        self._unreadable = 0
        self._dropped = 0

    @property
    def learning(self) -> bool:
        """Return True until the bins are known."""
        return self._bins is None

    def count(self, samples: Sequence[SampledCall | SampledStream]) -> None:
        """Count samples. Those that cannot be read are dropped."""
        for calls in alike(each for each in samples if isinstance(each, SampledCall)):
            self._count_calls(calls)
        self._count_streams([each for each in samples if isinstance(each, SampledStream)])

    def use(self, bins: bytes) -> None:
        """Use these bins from now on, and count the rows that waited for bins."""
        if bins == self._raw_bins:
            return
        self._raw_bins = bins
        try:
            found = PublishedBins.from_bytes(bins)
        except Unreadable as error:
            log.warning("the bins of a profile cannot be read", extra={"problem": str(error)})
            return
        self._keeps_predictions = found.predictions
        if found.id == self._bins_id:
            return
        self._bins, self._bins_id = found.bins, found.id
        self._profile = Profile()
        for columns in self._held:
            self._profile.count(columns, found.bins)
        self._held.clear()
        self._held_rows = 0

    def take_rows(self) -> list[bytes]:
        """Remove and return the raw rows that wait for the blob store, as lines of JSON."""
        kept, self._kept = self._kept, []
        return kept

    def take(self, rows_key: str = "", rows: int = 0) -> bytes | None:
        """Return the counts since the last call of :meth:`take`, as a message; None if it would be empty.

        ``rows_key`` is the key of the blob with the raw rows that were stored last. ``rows`` is the number of
        these rows.
        """
        piece = ProfilePiece(self._replica, self._begin, time.time(), self._bins_id)
        piece.rows_key, piece.rows = rows_key, rows
        if self._bins is None:
            self._summarize(piece)
        else:
            piece.profile, self._profile = self._profile, Profile()
        piece.predictions, self._predictions = self._predictions, []
        piece.dropped, self._dropped = self._dropped, 0
        if not (piece.profile.rows or piece.learned_rows or piece.predictions or rows_key):
            return None
        self._begin = time.time()
        return piece.to_bytes()

    def _count_calls(self, calls: Sequence[SampledCall]) -> None:
        """Count a group of similar calls in one step, because numpy is slow with few rows.

        The calls have equal call keys and equal output shapes.
        """
        try:
            rows = rows_of(calls)
            columns = Columns(len(rows))
            inputs, outputs = joined_inputs(calls), joined_outputs(calls)
            for tensor in inputs:
                add_tensor(columns, tensor, self._redact)
            predictions = add_outputs(columns, outputs, self._redact)
            if self._keep_rows:
                self._keep(rows, inputs, outputs)
        except (ValueError, KeyError, IndexError) as error:
            self._on_unreadable(error)
            return
        self._count(columns)
        if self._keeps_predictions:
            self._remember(rows, predictions)

    def _count_streams(self, streams: Sequence[SampledStream]) -> None:
        answers: list[TextAnswer] = []
        for each in streams:
            try:
                answers.append(text_answer(each))
            except (ValueError, KeyError, TypeError) as error:
                self._on_unreadable(error)
        if answers:
            columns = Columns(len(answers))
            add_texts(columns, answers)
            self._count(columns)

    def _count(self, columns: Columns) -> None:
        if self._bins is not None:
            self._profile.count(columns, self._bins)
            return
        self._held.append(columns)
        self._held_rows += columns.rows
        while self._held_rows > HELD_ROWS and len(self._held) > 1:
            oldest = self._held.pop(0)
            self._held_rows -= oldest.rows
            self._dropped += oldest.rows
            self._summarized = max(0, self._summarized - 1)

    def _summarize(self, piece: ProfilePiece) -> None:
        """Add summaries of the waiting rows to ``piece``. Skip the rows that an earlier piece summarized."""
        new, self._summarized = self._held[self._summarized :], len(self._held)
        piece.learned_rows = sum(each.rows for each in new)
        names = {name for each in new for name in each.numbers if name not in FIXED}
        for name in sorted(names):
            held = [each.numbers[name] for each in new if name in each.numbers]
            piece.summaries[name] = summarize(np.concatenate(held))

    def _remember(self, rows: Sequence[SampledRow], found: Predictions) -> None:
        """Keep the predictions of requests with one row.

        Feedback names a request, but no row. If a request has several rows, nobody knows which row the
        feedback is about.
        """
        for at, row in enumerate(rows):
            if row.request_rows <= 1 and row.trace and len(self._predictions) < MAX_PREDICTIONS:
                self._predictions.append(_prediction(row, found, at))

    def _keep(
        self,
        rows: Sequence[SampledRow],
        inputs: Sequence[SampledTensor],
        outputs: Sequence[SampledTensor],
    ) -> None:
        """Keep raw rows for the blob store, at most ``keep_rows`` in an hour.

        More rows would be useless, because the router keeps at most ``keep_rows`` raw rows of a version.
        """
        if (hour := int(time.time() // 3600)) != self._kept_hour:
            self._kept_hour, self._kept_in_hour = hour, 0
        if (left := self._keep_rows - self._kept_in_hour) > 0:
            lines = raw_lines(rows, inputs, outputs, self._redact, left)
            self._kept += lines
            self._kept_in_hour += len(lines)

    def _on_unreadable(self, error: Exception) -> None:
        self._unreadable += 1
        if self._unreadable == 1:
            log.warning("sampled calls cannot be counted", extra={"problem": str(error)})


def _prediction(row: SampledRow, found: Predictions, at: int) -> SampledPrediction:
    return SampledPrediction(
        telemetry.shown_id(row.trace),
        found.labels[at] if found.labels is not None else None,
        float(found.scores[at]) if found.scores is not None else None,
        float(found.confidence[at]) if found.confidence is not None else None,
        round(row.at, 3),
    )

"""Histograms of the times of requests, as arrays and in the short form that a report contains."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tidegate.kernel.protocol.latency_buckets import COUNT, FIRST_S, RATIO
from tidegate.kernel.protocol.traffic import ROWS, SparseRow

_LOG_RATIO = float(np.log(RATIO))
_OFFSETS = np.arange(len(ROWS)) * COUNT


def histograms_of(seconds: np.ndarray) -> np.ndarray:
    """Return a histogram for each column of ``seconds``.

    ``seconds``: an array with a row for each request, and a column for each time in ``ROWS``. The result has
    a row for each time in ``ROWS``, and a column for each bucket.
    """
    scaled = np.log(np.maximum(seconds, FIRST_S) / FIRST_S) / _LOG_RATIO
    at = np.minimum(scaled.astype(np.int64), COUNT - 1) + _OFFSETS
    return np.bincount(at.ravel(), minlength=len(ROWS) * COUNT).reshape(len(ROWS), COUNT)


def no_times() -> np.ndarray:
    """Return empty histograms."""
    return np.zeros((len(ROWS), COUNT), np.int64)


def sparse(histograms: np.ndarray) -> list[SparseRow]:
    """Return histograms in the short form of ``SparseRow``."""
    found: list[SparseRow] = []
    for row in histograms:
        used = np.flatnonzero(row)
        found.append([int(used[0]), *row[used[0] : used[-1] + 1].tolist()] if len(used) else [])
    return found


def dense(rows: Sequence[SparseRow]) -> np.ndarray:
    """Return histograms from the short form of ``SparseRow``. Unknown rows and buckets are ignored."""
    found = no_times()
    for into, row in zip(found, rows, strict=False):
        if len(row) > 1 and 0 <= row[0] < COUNT:
            counts = row[1 : 1 + COUNT - row[0]]
            into[row[0] : row[0] + len(counts)] = counts
    return found

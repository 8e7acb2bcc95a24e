"""Compute the figures of a capacity card from the measured times of calls. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tidegate.kernel.protocol.verification import USUAL_ROWS, BatchFigures


def sizes(largest: int) -> list[int]:
    """Return the batch sizes to measure, in rows.

    ``largest``: the maximum number of rows in a call; 0 means that the model has no batch axis.
    """
    return sorted({1, min(USUAL_ROWS, max(1, largest)), max(1, largest)})


def figures(rows: int, times_s: Sequence[float], wall_s: float) -> BatchFigures:
    """Return the figures of one batch size: quantiles of the times of its calls, and the rows per second.

    ``wall_s``: the seconds from the start of the first call to the end of the last one.
    """
    ordered = sorted(times_s)
    return BatchFigures(
        rows=rows,
        p50_ms=_ms(_rank(ordered, 0.5)),
        p99_ms=_ms(_rank(ordered, 0.99)),
        rows_per_s=round(rows * len(ordered) / max(wall_s, 1e-9), 3),
    )


def requests_per_s(batches: Sequence[BatchFigures]) -> float | None:
    """Return how many requests of one row a replica can answer in a second, with the best batch size.

    None means that no call was measured.
    """
    return max((each.rows_per_s for each in batches), default=None)


def _rank(ordered: Sequence[float], share: float) -> float:
    """Return the quantile ``share`` of ``ordered``. For example, ``share`` 0.99 gives p99.

    ``ordered``: the sorted values. The quantile is the smallest of these values that fulfils this condition:
    at least the fraction ``share`` of the values is less than or equal to it.
    """
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)

"""The gateways' reports about the traffic of each endpoint: outcomes, and histograms of times.

A report has totals since the start of a gateway process, so the next report replaces a lost one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import orjson
from typing_extensions import Self

from tidegate.kernel.protocol.latency_buckets import COUNT, FIRST_S, RATIO

# Each of these times of a request has a histogram: the total time, and the parts of the total time.
TOTAL = "total"
LEDGER = ("decode", "transit", "wait", "compute", "encode")
ROWS = (TOTAL, *LEDGER)

# A histogram as a list: the index of the first bucket that is not empty, then the counts from this bucket to
# the last one that is not empty. An empty list means no counts.
SparseRow = list[int]

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


@dataclass(slots=True)
class EndpointTraffic:
    """One gateway's totals of the requests to an endpoint.

    ``outcomes``: the number of requests with each outcome, which is ``ok`` or the reason of the error.
    ``failed``: the number of requests that failed because of the service (status 500 or more).
    ``times``: for each Deployment, the histograms of the times of its answered requests.
    """

    outcomes: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    times: dict[str, list[SparseRow]] = field(default_factory=dict)


@dataclass(slots=True)
class TrafficReport:
    """The totals of one gateway process, by endpoint.

    ``at``: when the report was made, in seconds since the epoch on the gateway's clock.
    """

    incarnation: str
    at: float
    endpoints: dict[str, EndpointTraffic] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """Return the report as JSON."""
        return orjson.dumps(asdict(self))

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Read a report. Unknown fields of a newer writer are ignored."""
        data = orjson.loads(raw)
        known = EndpointTraffic.__dataclass_fields__
        return cls(
            data["incarnation"],
            data["at"],
            {
                name: EndpointTraffic(**{k: v for k, v in each.items() if k in known})
                for name, each in data["endpoints"].items()
            },
        )
